"""Ours against the engines that are made for speed, on the same random weights.

    for name in llama.cpp onnxruntime openvino ctranslate2 torchao optimum-onnx; do
        python -m venv .peers/$name && .peers/$name/bin/pip install -r bench/requirements-$name.txt; done
    python -m bench.peers --folders F --convert     # every engine's files into F: a quarter of an hour, 16 GB
    python -m bench.peers --folders F --write       # the table and the picture of docs/speed.md

Each engine runs in a process and an environment of its own; one that is not installed is left out and named.
A round has every engine of every model once, and starts only when the machine is quiet (`bench.machine`).
The table has medians of the rounds: tokens a second (decode: one token after 512 and after 1,900; prefill:
512 tokens), seconds from nothing to the first token, the largest memory, and the size of the logits' error
against float32 in units of the logits.
"""
