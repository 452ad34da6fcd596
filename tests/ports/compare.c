/* What a port computes against a kit, with nothing but the C library: reads KIT/expected.safetensors and the port's
   file, and prints every stage that both have, in the order of the computation.

       cc -O2 -o compare compare.c -lm && ./compare KIT theirs.safetensors [float32 | bfloat16 | float16 | float64]

   Differences are in units of the kit's noise: what correct arithmetic of that precision may be off. Up to 4 times
   that a stage is equal (=), beyond it differs (x). Exit status 0: equal, 1: different, 2: unusable. */

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { char *data; uint64_t header, size; } File;
typedef struct { char name[200], dtype[8]; int64_t shape[8]; int dims; int64_t count, start, end; } Tensor;
typedef struct { char stage[200]; int order; double largest, typical, units; } Row;

static int fail(const char *what, const char *why) {
    fprintf(stderr, "%s: %s\n", what, why);
    exit(2);
}

static File opened(const char *path) {
    FILE *f = fopen(path, "rb");
    if (!f) fail(path, "cannot be read");
    fseek(f, 0, SEEK_END);
    File file = {NULL, 0, (uint64_t)ftell(f)};
    rewind(f);
    file.data = calloc(file.size + 1, 1);
    if (file.size < 8 || fread(file.data, 1, file.size, f) != file.size) fail(path, "is no safetensors file");
    fclose(f);
    memcpy(&file.header, file.data, 8);
    if (file.header > file.size - 8) fail(path, "is no safetensors file");
    return file;
}

static int bytes_of(const char *dtype) {
    if (!strcmp(dtype, "F64")) return 8;
    if (!strcmp(dtype, "F32")) return 4;
    return !strcmp(dtype, "F16") || !strcmp(dtype, "BF16") ? 2 : 0;
}

/* All tensors of a header: {"NAME":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}, ...} */
static Tensor *tensors(File f, const char *path, int *n) {
    char *at = f.data + 8, *end = at + f.header;
    Tensor *found = NULL;
    *n = 0;
    while ((at = memchr(at, '"', end - at))) {
        char *close = memchr(at + 1, '"', end - at - 1);
        if (!close || close - at - 1 >= 200) fail(path, "has a name that is too long");
        Tensor t = {.count = 1};
        memcpy(t.name, at + 1, close - at - 1);
        char *brace = memchr(close, '}', end - close);
        if (!brace) break;
        char saved = *brace;
        *brace = 0;
        char *type = strstr(close, "\"dtype\":\""), *shape = strstr(close, "\"shape\":["),
             *offsets = strstr(close, "\"data_offsets\":[");
        if (type && shape && offsets) {
            sscanf(type + 9, "%7[A-Z0-9]", t.dtype);
            for (char *s = shape + 9; *s && *s != ']' && t.dims < 8;) {
                t.count *= t.shape[t.dims++] = strtoll(s, &s, 10);
                if (*s == ',') s++;
            }
            char *s = offsets + 16;
            t.start = strtoll(s, &s, 10);
            t.end = strtoll(s + 1, &s, 10);
            int64_t room = (int64_t)(f.size - 8 - f.header);
            if (t.start < 0 || t.end < t.start || t.end > room) fail(path, "is cut off");
            if (bytes_of(t.dtype) && t.end - t.start == t.count * bytes_of(t.dtype)) {
                found = realloc(found, (*n + 1) * sizeof *found);
                found[(*n)++] = t;
            }
        }
        *brace = saved;
        at = brace;
    }
    return found;
}

static Tensor *named(Tensor *all, int n, const char *name) {
    for (int i = 0; i < n; i++)
        if (!strcmp(all[i].name, name)) return all + i;
    return NULL;
}

static double half(uint16_t bits) {
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    double sign = bits >> 15 ? -1 : 1;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    return sign * (exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24));
}

static double value(File f, const Tensor *t, int64_t i) {
    const char *at = f.data + 8 + f.header + t->start + i * bytes_of(t->dtype);
    if (!strcmp(t->dtype, "F64")) {
        double d;
        memcpy(&d, at, 8);
        return d;
    }
    float s;
    if (!strcmp(t->dtype, "F32")) {
        memcpy(&s, at, 4);
        return s;
    }
    uint16_t bits;
    memcpy(&bits, at, 2);
    if (!strcmp(t->dtype, "F16")) return half(bits);
    uint32_t wide = (uint32_t)bits << 16;
    memcpy(&s, &wide, 4);
    return s;
}

static const char *ORDER[] = {
    "embeddings", "attn_in", "q", "k", "v", "q_normed", "k_normed", "q_rotated", "k_rotated", "scores", "weights", "heads",
    "attn_out", "attn_sum", "mlp_in", "mlp_up", "mlp_act", "mlp_out", "out", "norm", "logits", "loss"};

/* Where a stage stands in the computation: layers.N.STAGE between the embeddings and the end. */
static int order_of(const char *stage) {
    int layer = -1;
    const char *kind = stage;
    if (!strncmp(stage, "layers.", 7)) {
        layer = atoi(stage + 7);
        kind = strchr(stage + 7, '.') ? strchr(stage + 7, '.') + 1 : stage;
    } else if (strcmp(stage, "embeddings")) {
        layer = 1000000;
    }
    for (int i = 0; i < (int)(sizeof ORDER / sizeof *ORDER); i++)
        if (!strcmp(kind, ORDER[i])) return (layer + 1) * 32 + i;
    return (layer + 1) * 32 + 31;
}

static int earlier(const void *a, const void *b) { return ((Row *)a)->order - ((Row *)b)->order; }

static Row measured(const char *stage, File e, Tensor *exact, File t, Tensor *theirs, Tensor *noise, int precision) {
    Row row = {.order = order_of(stage)};
    int64_t seen = 0;
    double squares = 0;
    snprintf(row.stage, sizeof row.stage, "%s", stage);
    for (int64_t i = 0; i < exact->count; i++) {
        double a = value(e, exact, i), b = value(t, theirs, i);
        if (isnan(a)) continue; /* nobody has to agree on it */
        double difference = isnan(b) ? INFINITY : fabs(a - b);
        row.largest = difference > row.largest ? difference : row.largest;
        squares += difference * difference, seen++;
    }
    row.typical = seen ? sqrt(squares / seen) : 0;
    double one = value(e, noise, 2 * precision), two = value(e, noise, 2 * precision + 1);
    double units[] = {one ? row.largest / one : row.largest ? INFINITY : 0, two ? row.typical / two : row.typical ? INFINITY : 0};
    row.units = units[0] > units[1] ? units[0] : units[1];
    return row;
}

int main(int count, char **arguments) {
    const char *names[] = {"float64", "float32", "bfloat16", "float16"};
    int precision = 1;
    if (count < 3 || count > 4) return fail("compare", "give a kit, a file of values and, if not float32, a precision");
    if (count == 4) {
        for (precision = 0; precision < 4 && strcmp(names[precision], arguments[3]); precision++) {}
        if (precision == 4) fail(arguments[3], "is none of float64, float32, bfloat16, float16");
    }
    char path[4096];
    snprintf(path, sizeof path, "%s/expected.safetensors", arguments[1]);
    File e = opened(path), t = opened(arguments[2]);
    int n, m, compared = 0;
    Tensor *expected = tensors(e, path, &n), *theirs = tensors(t, arguments[2], &m);
    const char *cases[] = {"plain", "left", "right", "cached", "positions", "massive", "types", "long", "pictures"};
    Row *first = NULL;
    char where[32] = "";
    for (int c = 0; c < 9; c++) {
        Row *rows = calloc(n + 1, sizeof *rows);
        int size = 0;
        for (int i = 0; i < m; i++) {
            char *slash = strchr(theirs[i].name, '/'), name[232];
            if (!slash || strncmp(theirs[i].name, cases[c], slash - theirs[i].name) || cases[c][slash - theirs[i].name]) continue;
            Tensor *exact = named(expected, n, theirs[i].name);
            snprintf(name, sizeof name, "noise/%s", theirs[i].name);
            Tensor *noise = named(expected, n, name);
            if (!exact || !noise || noise->count != 8) continue;
            if (exact->count != theirs[i].count) fail(theirs[i].name, "has another size than the kit's");
            rows[size++] = measured(slash + 1, e, exact, t, theirs + i, noise, precision);
        }
        if (!size) continue;
        qsort(rows, size, sizeof *rows, earlier);
        printf("  %-18s %9s %9s %9s\n", cases[c], "largest", "typical", "x noise");
        for (int i = 0; i < size; i++) {
            Row *row = rows + i;
            int wrong = !(row->units <= 4);
            printf("%c %-18s %9.1e %9.1e %9.3g\n", wrong ? 'x' : '=', row->stage, row->largest, row->typical, row->units);
            if (wrong && (!first || row->order < first->order)) first = row, snprintf(where, sizeof where, "%s", cases[c]);
        }
        compared += size;
    }
    if (!compared) fail(arguments[2], "holds no stage of this kit: name them CASE/STAGE, as KIT.md says");
    if (!first) printf("equal: %d stages, each within 4 times the noise of %s\n", compared, names[precision]);
    else printf("First difference: %s in case %s is %.3gx %s noise off\n", first->stage, where, first->units, names[precision]);
    return first != NULL;
}
