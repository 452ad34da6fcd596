/* GPT-Neo in C, with nothing but the C library: reads a kit's config.json and safetensors, and writes the values of
   its cases into a safetensors file.

       cc -O2 -o gpt_neo gpt_neo.c -lm && ./gpt_neo KIT theirs.safetensors
*/

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { char *data; long header; } File;

static char *whole(const char *folder, const char *name, long *size) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "rb");
    if (!f) { fprintf(stderr, "%s cannot be read\n", path); exit(2); }
    fseek(f, 0, SEEK_END);
    *size = ftell(f);
    rewind(f);
    char *text = calloc(*size + 1, 1);
    if (fread(text, 1, *size, f) != (size_t)*size) exit(2);
    fclose(f);
    return text;
}

static File opened(const char *folder, const char *name) {
    long size;
    File f = {whole(folder, name, &size), 0};
    f.header = (long)*(uint64_t *)f.data;
    return f;
}

/* The data of a tensor, and its shape; NULL if there is none of that name. */
static void *tensor(File f, const char *name, int *shape) {
    char key[512];
    snprintf(key, sizeof key, "\"%s\":{", name);
    char *header = f.data + 8, end = header[f.header];
    header[f.header] = 0;
    char *at = strstr(header, key);
    header[f.header] = end;
    if (!at) return NULL;
    char *s = strstr(at, "\"shape\":[") + 9;
    for (int i = 0; *s != ']'; i++) {
        shape[i] = (int)strtol(s, &s, 10);
        if (*s == ',') s++;
    }
    return f.data + 8 + f.header + atol(strstr(at, "\"data_offsets\":[") + 16);
}

static int number(const char *json, const char *name) {
    char key[128];
    snprintf(key, sizeof key, "\"%s\": ", name);
    return atoi(strstr(json, key) + strlen(key));
}

static File model;
static int C, H, L, F_, V, WINDOW, dims[8];

static float *weight(const char *format, int layer) {
    char name[256];
    snprintf(name, sizeof name, format, layer);
    float *w = tensor(model, name, dims);
    if (!w) { fprintf(stderr, "%s is missing\n", name); exit(2); }
    return w;
}

static void norm(float *out, const float *x, const float *w, const float *b) {
    float mean = 0, variance = 0;
    for (int i = 0; i < C; i++) mean += x[i] / C;
    for (int i = 0; i < C; i++) variance += (x[i] - mean) * (x[i] - mean) / C;
    for (int i = 0; i < C; i++) out[i] = (x[i] - mean) / sqrtf(variance + 1e-5f) * w[i] + b[i];
}

static void dense(float *out, const float *x, const float *w, const float *b, int in, int n) {
    for (int o = 0; o < n; o++) {
        float sum = b ? b[o] : 0;
        for (int i = 0; i < in; i++) sum += w[o * in + i] * x[i];
        out[o] = sum;
    }
}

static float gelu(float x) { return 0.5f * x * (1 + tanhf(0.7978845608f * (x + 0.044715f * x * x * x))); }

static void attention(float *y, const float *q, const float *k, const float *v, int t, int local, const int64_t *mask) {
    int D = C / H;
    float scores[1024];
    for (int h = 0; h < H; h++) {
        float most = -1e30f, total = 0;
        int first = local && t >= WINDOW ? t - WINDOW + 1 : 0;
        for (int s = first; s <= t; s++) {
            scores[s] = 0;
            for (int d = 0; d < D; d++) scores[s] += q[t * C + h * D + d] * k[s * C + h * D + d];
            if (mask && !mask[s]) scores[s] = -1e30f;
            if (scores[s] > most) most = scores[s];
        }
        for (int s = first; s <= t; s++) total += scores[s] = expf(scores[s] - most);
        for (int d = 0; d < D; d++) {
            float sum = 0;
            for (int s = first; s <= t; s++) sum += scores[s] / total * v[s * C + h * D + d];
            y[t * C + h * D + d] = sum;
        }
    }
}

/* Logits (T, V) of one row, and what leaves each layer (L, T, C). */
static void row(const int64_t *ids, const int64_t *mask, const int64_t *places, const int64_t *types, int T,
                float *logits, float *outs) {
    float *x = calloc(T * C, 4), *n = calloc(T * C, 4), *q = calloc(T * C, 4), *k = calloc(T * C, 4);
    float *v = calloc(T * C, 4), *y = calloc(T * C, 4), *f = calloc(F_, 4), *sum = calloc(C, 4);
    float *wte = weight("transformer.wte.weight", 0), *wpe = weight("transformer.wpe.weight", 0);
    for (int t = 0; t < T; t++)
        for (int i = 0; i < C; i++) {
            x[t * C + i] = wte[ids[t] * C + i] + wpe[(places ? places[t] : t) * C + i];
            if (types) x[t * C + i] += wte[types[t] * C + i];
        }
    for (int l = 0; l < L; l++) {
        for (int t = 0; t < T; t++) {
            norm(n + t * C, x + t * C, weight("transformer.h.%d.ln_1.weight", l), weight("transformer.h.%d.ln_1.bias", l));
            dense(q + t * C, n + t * C, weight("transformer.h.%d.attn.attention.q_proj.weight", l), NULL, C, C);
            dense(k + t * C, n + t * C, weight("transformer.h.%d.attn.attention.k_proj.weight", l), NULL, C, C);
            dense(v + t * C, n + t * C, weight("transformer.h.%d.attn.attention.v_proj.weight", l), NULL, C, C);
        }
        for (int t = 0; t < T; t++) {
            attention(y, q, k, v, t, l % 2 == 1, mask);
            dense(sum, y + t * C, weight("transformer.h.%d.attn.attention.out_proj.weight", l),
                  weight("transformer.h.%d.attn.attention.out_proj.bias", l), C, C);
            for (int i = 0; i < C; i++) x[t * C + i] += sum[i];
            norm(n, x + t * C, weight("transformer.h.%d.ln_2.weight", l), weight("transformer.h.%d.ln_2.bias", l));
            dense(f, n, weight("transformer.h.%d.mlp.c_fc.weight", l), weight("transformer.h.%d.mlp.c_fc.bias", l), C, F_);
            for (int i = 0; i < F_; i++) f[i] = gelu(f[i]);
            dense(sum, f, weight("transformer.h.%d.mlp.c_proj.weight", l), weight("transformer.h.%d.mlp.c_proj.bias", l), F_, C);
            for (int i = 0; i < C; i++) x[t * C + i] += sum[i];
        }
        memcpy(outs + (long)l * T * C, x, 4L * T * C);
    }
    for (int t = 0; t < T; t++) {
        norm(n, x + t * C, weight("transformer.ln_f.weight", 0), weight("transformer.ln_f.bias", 0));
        dense(logits + (long)t * V, n, wte, NULL, C, V);
    }
    free(x), free(n), free(q), free(k), free(v), free(y), free(f), free(sum);
}

int main(int count, char **arguments) {
    if (count != 3) { fprintf(stderr, "gpt_neo KIT theirs.safetensors\n"); return 2; }
    long size;
    char *config = whole(arguments[1], "config.json", &size);
    model = opened(arguments[1], "model.safetensors");
    File inputs = opened(arguments[1], "inputs.safetensors");
    C = number(config, "hidden_size"), H = number(config, "num_heads"), L = number(config, "num_layers");
    F_ = number(config, "intermediate_size"), V = number(config, "vocab_size"), WINDOW = number(config, "window_size");

    const char *cases[] = {"plain", "left", "right", "positions", "massive", "types"};
    char header[8192] = "{", *data = calloc(1 << 22, 1), name[64];
    long at = 0;
    for (int c = 0; c < 6; c++) {
        int shape[8];
        int64_t *given[4];
        const char *names[] = {"input_ids", "attention_mask", "position_ids", "token_type_ids"};
        for (int i = 3; i >= 0; i--) {
            snprintf(name, sizeof name, "%s/%s", cases[c], names[i]);
            given[i] = tensor(inputs, name, shape);
        }
        if (!given[0]) continue;
        int B = shape[0], T = shape[1];
        float *logits = (float *)(data + at), *outs = logits + (long)B * T * V, *own = calloc((long)L * T * C, 4);
        for (int b = 0; b < B; b++) {
            int64_t *of[4];
            for (int i = 0; i < 4; i++) of[i] = given[i] ? given[i] + b * T : NULL;
            row(of[0], of[1], of[2], of[3], T, logits + (long)b * T * V, own);
            for (int l = 0; l < L; l++) memcpy(outs + ((long)l * B + b) * T * C, own + (long)l * T * C, 4L * T * C);
        }
        sprintf(header + strlen(header), "%s\"%s/logits\":{\"dtype\":\"F32\",\"shape\":[%d,%d,%d],\"data_offsets\":[%ld,%ld]}",
                at ? "," : "", cases[c], B, T, V, at, at + 4L * B * T * V);
        at += 4L * B * T * V;
        for (int l = 0; l < L; l++, at += 4L * B * T * C)
            sprintf(header + strlen(header), ",\"%s/layers.%d.out\":{\"dtype\":\"F32\",\"shape\":[%d,%d,%d],\"data_offsets\":[%ld,%ld]}",
                    cases[c], l, B, T, C, at, at + 4L * B * T * C);
        free(own);
    }
    strcat(header, "}");
    uint64_t length = strlen(header);
    FILE *out = fopen(arguments[2], "wb");
    if (!out) { fprintf(stderr, "%s cannot be written\n", arguments[2]); return 2; }
    fwrite(&length, 8, 1, out), fwrite(header, 1, length, out), fwrite(data, 1, at, out);
    return fclose(out) != 0;
}
