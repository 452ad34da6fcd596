"""Run examples by any Python that has their library: python tests/run_documents.py IN.json OUT.pt LIBRARY

LIBRARY is `transformers` or `decoders.hf`, which then stands where the examples say transformers. OUT gets, for each, the
names that it left behind with what they hold, or the error. It imports nothing of this project by itself, so that it runs where
only Transformers is installed.
"""

import ast
import inspect
import io
import json
import re
import sys
import types
import warnings

import torch


def request(pictures: str):
    """The library `requests`, with one picture behind every address."""
    with open(pictures, "rb") as file:
        content = file.read()
    module = types.ModuleType("requests")
    module.get = lambda url, **more: types.SimpleNamespace(content=content, raw=io.BytesIO(content))
    return module


def held(value):
    """What of a value can be compared between libraries."""
    if isinstance(value, torch.Tensor):
        return {"tensor": value.detach().clone()}
    if isinstance(value, (str, int, float, bool)) or value is None:
        return {"plain": value}
    if hasattr(value, "keys") and hasattr(value, "__getitem__") and not isinstance(value, type):
        return {"names": {str(key): held(value[key]) for key in list(value.keys())}}
    if isinstance(value, (list, tuple)):
        return {"several": [held(one) for one in value]}
    return {"object": type(value).__name__}


def run(code: str, library: str, world: dict) -> dict:
    code = (
        re.sub(r"^from transformers[\w.]* import", "from " + library + " import", code, flags=re.M)
        if library != "transformers"
        else code
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)  # which a failed load of 4.37 leaves behind
    if re.search(r"Config\(\)", code):  # eight billion weights are described, not made
        code = re.sub(
            r"^(model = \w+\((?:configuration|model_config)\))",
            r"with torch.device('meta'): \1",
            code,
            flags=re.M,
        )
        code = code.replace(
            "with torch.device('meta'): model = FuyuForCausalLM(model_config).from",
            "model = FuyuForCausalLM.from",
        )
    before = set(world)
    shown = []
    lines = code.split("\n")
    try:
        for statement in ast.parse(code).body:
            torch.manual_seed(0)  # loading draws in some versions
            part = "\n".join(lines[statement.lineno - 1 : statement.end_lineno])
            if isinstance(statement, ast.Expr):
                shown.append(held(eval(compile(ast.Expression(statement.value), "example", "eval"), world)))
            else:
                exec(compile(part, "example", "exec"), world)
    except BaseException as error:  # noqa: BLE001
        return {"error": type(error).__name__ + ": " + str(error).split("\n")[0][:200]}
    names = {
        name: held(value)
        for name, value in world.items()
        if name not in before
        and not name.startswith("__")
        and not isinstance(value, (types.ModuleType, type, torch.nn.Module))
        and hasattr(value, "__class__")
        and not callable(value)
    }
    return {"names": names, "shown": shown}


def found(library: str, name: str):
    """A class of the library, wherever it keeps it."""
    root = __import__(library, fromlist=["x"])
    try:
        return getattr(root, name)
    except (AttributeError, ImportError):
        pass
    places = {
        "OpenAIGPTDoubleHeadsModelOutput": "models.openai.modeling_openai",
        "FuyuProcessor": "models.fuyu.processing_fuyu",
        "FuyuImageProcessor": "models.fuyu.image_processing_fuyu",
    }
    return getattr(__import__(library + "." + places[name], fromlist=["x"]), name)


def probe(cls: str, method: str, arguments: list, fields: list, ids: dict, library: str) -> dict:
    """Which documented arguments the library's method does not name, and which fields it does not return."""
    try:
        kind = found(library, cls)
        known = inspect.signature(getattr(kind, method) if method != "__init__" else kind.__init__).parameters
    except Exception as error:  # noqa: BLE001
        return {"error": type(error).__name__ + ": " + str(error).split("\n")[0][:160]}
    open_end = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values())
    missing = [name for name in arguments if not name.startswith("*") and name not in known]
    if cls.endswith("Config") and open_end:
        made = kind()
        missing = [name for name in missing if not hasattr(made, name)]
    result = {"missing": missing, "swallowed": open_end}
    if fields:
        try:
            prefix = next(prefix for prefix in sorted(ids, key=len, reverse=True) if cls.startswith(prefix))
            result["absent"] = [name for name in fields if name not in returned(kind, ids[prefix], arguments)]
        except Exception as error:  # noqa: BLE001
            result["failed"] = type(error).__name__ + ": " + str(error).split("\n")[0][:160]
    return result


def returned(kind, id: str, arguments: list) -> list:
    """The names in what a pass with all documented wishes gives."""
    try:
        model = kind.from_pretrained(id, attn_implementation="eager")
    except (TypeError, ValueError):  # 4.37 knows no eager for some
        model = kind.from_pretrained(id)
    x = torch.tensor([[5, 6, 7, 8]])
    wishes = {"output_attentions": True, "output_hidden_states": True}
    if "mc_labels" in arguments:
        x, wishes = (
            x[:, None].expand(1, 2, 4),
            {**wishes, "mc_labels": torch.tensor([1]), "mc_token_ids": torch.tensor([[3, 3]])},
        )
    if "start_positions" in arguments:
        wishes.update(start_positions=torch.tensor([1]), end_positions=torch.tensor([2]))
    if "labels" in arguments:
        wishes["labels"] = (
            torch.tensor([1])
            if "ForSequence" in kind.__name__
            else (x % 2 if "ForToken" in kind.__name__ else x)
        )
    if "use_cache" in arguments:
        wishes["use_cache"] = True
    return list(model(x, **wishes).keys())


def main(source: str, target: str, library: str) -> None:
    warnings.simplefilter("ignore")
    with open(source) as file:
        job = json.load(file)
    results = []
    for code in job["examples"]:
        world = {"torch": torch, "io": io}
        world["requests"] = request(job["picture"])
        try:
            from PIL import Image

            world["image_pil"] = Image.open(job["picture"])
        except ImportError:
            pass
        results.append(
            run(
                code.replace("/output/path", job["folder"] % ("fuyu" if "Fuyu" in code else "persimmon")),
                library,
                world,
            )
        )
    probes = [probe(*one, job["ids"], library) for one in job.get("names", ())]
    version = getattr(sys.modules.get("transformers"), "__version__", "")
    torch.save({"version": version, "results": results, "names": probes}, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
