"""How fast anomalib's STFPM is, one setting a request; it runs in anomalib's own environment.

    PEER/bin/python -m benchmarks.anomalib_speed --weights FILE --threads 2

`benchmarks.peer_speed` starts it from the repository's root; nothing of Proctor is imported here. Each line of standard
input is a `Setting` with seconds, each line of standard output its frames a second. Between requests nothing computes.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino  # type: ignore[import-not-found]
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.anomalib_peer import Outputs, train_stfpm

_SIZE = 256
_IN_FLIGHT = 2  # requests of the throughput mode, as many as it has streams


def main() -> None:
    """Answer requests until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="safetensors of a ResNet-18 up to layer3")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for answers alone
        images = torch.randn(4, 3, _SIZE, _SIZE, generator=torch.Generator().manual_seed(0))
        model = train_stfpm(images, load_file(options.weights), 1, torch.device("cpu")).eval()
    packages = ("anomalib", "openvino", "torch")
    print(json.dumps({package: version(package) for package in packages}), flush=True)
    ways: dict[str, Any] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        key = json.dumps(asked["setting"])
        with contextlib.redirect_stdout(sys.stderr):
            if key not in ways:
                ways[key] = _way(model, asked["setting"], options.threads)
            run, dtype = ways[key]
            answer = {"fps": run(asked["seconds"]), "dtype": dtype}
        print(json.dumps(answer), flush=True)


def _way(model: nn.Module, setting: dict[str, Any], threads: int) -> tuple[Callable[[float], float], str]:
    """Return what measures a setting for so many seconds, and the precision it computes in."""
    images = torch.randn(setting["batch"], 3, _SIZE, _SIZE, generator=torch.Generator().manual_seed(1))
    if setting["runtime"] == "torch":
        return partial(_one_by_one, lambda: _eager(model, images), setting["batch"]), "float32"
    network = openvino.convert_model(Outputs(model).eval(), example_input=images, input=[images.shape])
    throughput = setting["mode"] == "throughput"
    properties = {
        "PERFORMANCE_HINT": setting["mode"].upper(),
        "NUM_STREAMS": _IN_FLIGHT if throughput else 1,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": setting["precision"],
    }
    compiled = openvino.compile_model(network, "CPU", properties)
    dtype = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    array = images.numpy()
    if throughput:
        return partial(_in_flight, openvino.AsyncInferQueue(compiled, _IN_FLIGHT), array), dtype
    return partial(_one_by_one, lambda: compiled([array], share_inputs=True), setting["batch"]), dtype


@torch.inference_mode()
def _eager(model: nn.Module, images: Tensor) -> object:
    return model(images)


def _one_by_one(call: Callable[[], object], batch: int, seconds: float) -> float:
    call()
    calls, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds or calls < 2:
        call()
        calls += 1
    return calls * batch / (time.perf_counter() - started)


def _in_flight(queue: Any, array: np.ndarray, seconds: float) -> float:
    for _ in range(_IN_FLIGHT):
        queue.start_async([array], share_inputs=True)
    queue.wait_all()
    calls, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds or calls < 2 * _IN_FLIGHT:
        queue.start_async([array], share_inputs=True)
        calls += 1
    queue.wait_all()
    return calls * len(array) / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
