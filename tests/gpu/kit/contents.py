"""What the two calls carry, beside this repository."""

from __future__ import annotations

PYTHON = "3.12"
CALL_BYTES = 64 << 20
"""The most bytes of one call, this repository included."""
ARCHITECTURES = frozenset((90,))
"""Hopper."""

ENGINE = (
    *("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "hjson", "msgspec", "pyzmq", "cachetools"),
    *(
        "pybase64",
        "cbor2",
        "oss-harmony",
        "openai",
        "httpx2",
        "httpcore2",
        "truststore",
        "sniffio",
        "jiter",
        "xgrammar",
        "apache-tvm-ffi",
        "fastapi",
    ),
    *("starlette", "partial-json-parser", "llguidance", "jsonschema", "jsonschema-specifications", "referencing"),
    *("rpds-py", "compressed-tensors", "loguru", "blake3", "cryptography", "cffi", "pycparser"),
)
"""Packages of call 1, as the lock file pins them: what vLLM, DeepSpeed and this project import of what is not there."""
RUNS = (
    "beartype",
    "datasets",
    "dill",
    "multiprocess",
    "plotly",
    "math-verify",
    "latex2sympy2-extended",
    "antlr4-python3-runtime",
    "simplemma",
)
"""Packages of call 2, beside Ray."""
COPIED = ("deepspeed",)
"""Packages of Python alone that have no wheel: they are copied from this environment."""

_THERE = """
absl-py accelerate aiohappyeyeballs aiohttp aiosignal annotated-doc anyio attrs certifi charset-normalizer click cloudpickle
contourpy coverage cuda-bindings cuda-core cuda-pathfinder cycler einops filelock fonttools frozenlist fsspec grpcio h11 hf-xet
httpcore httpx huggingface-hub hypothesis idna iniconfig jaxtyping jinja2 joblib kiwisolver llvmlite markdown markdown-it-py
markupsafe matplotlib mdurl ml-dtypes mpmath msgpack multidict mypy-extensions narwhals networkx ninja numba numpy nvidia-ml-py
opencv-python-headless packaging pandas pathspec peft pillow pluggy prometheus-client propcache protobuf psutil py-cpuinfo
pyarrow pygments pyparsing pytest pytest-timeout python-dateutil pyyaml regex requests rich safetensors sentencepiece setuptools
shellingham six sortedcontainers sympy tabulate tensorboard tensorboard-data-server tiktoken tokenizers torch torchaudio
torchvision tqdm transformers triton typer typing-extensions urllib3 uvloop wadler-lindig werkzeug wrapt xxhash yarl
"""
THERE = frozenset(_THERE.split())
"""Packages of such a machine, as far as the lock file has them too."""

VLLM_LIBRARIES = ("_C_stable_libtorch.abi3.so", "_vllm_fa3_C.abi3.so", "cumem_allocator.abi3.so", "spinloop.abi3.so")
"""The libraries that an engine of a dense model loads; they need no torch of one version."""
RAY_LEFT_OUT = (
    "jars",
    "dashboard/client",
    "rllib",
    "tune",
    "train",
    "cpp",
    "_private/runtime_env/agent/thirdparty_files/test",
)
"""Folders of Ray that no run here uses."""

ENTRY_POINTS = {"grpo_ray-0.1.0.dist-info": "[vllm.general_plugins]\ngrpo_ray_weights = actors.weights:register\n"}
"""What pip would have installed of this project: vLLM's processes find the weight transfer by it."""
