"""What a model costs: parameters, multiply-accumulates, milliseconds.

All are taken from the live model, so they are right after a cut.
"""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import students
from students import Detector


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts `model` in eval mode; afterwards every submodule is back in its own mode, frozen normalisation included."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, trainable or not; a shared one counts once, buffers do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_nonzero(model: nn.Module) -> int:
    """Parameters, but for weights (of more than one dimension) that are exactly 0, as masks leave them; all of a model
    on the meta device, which has no values."""
    return sum(int(p.count_nonzero()) if p.dim() > 1 and not p.is_meta else p.numel() for p in model.parameters())


def share_nonzero(model: nn.Module) -> float:
    """Share of the parameters that are not such zeros."""
    return count_nonzero(model) / count_parameters(model)


def on_meta(model: nn.Module) -> nn.Module:
    """A copy on the meta device, of shapes alone, so that nothing it does takes memory or arithmetic; the model itself
    if it is there already."""
    if all(tensor.is_meta for tensor in model.parameters()):
        return model
    # deepcopy takes what is in its memo for copied, so no value is
    shapes = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, shapes).to("meta")


def run_whole(model: nn.Module, images: Tensor) -> object:
    """A forward pass; of a detector with what comes after it but selection: a two-stage detector's ROI head, on as many
    boxes as it proposes at most in evaluation, whatever the image shows."""
    return model.traced(model(images)) if isinstance(model, Detector) else model(images)


def count_macs(model: nn.Module, image_size: tuple[int, int]) -> int:
    """Multiply-accumulates of one pass on one image, see `run_whole`.

    One MAC is two of the FLOPs of `torch.utils.flop_counter`: what convolutions, matrix products and attention cost,
    without biases, normalisation, activations, resizing and torchvision's own operators. A copy of the model runs on
    the meta device, where nothing is computed.

    Args:
        model: takes images (B, 3, H, W).
        image_size: (height, width) in pixels.
    """
    model = on_meta(model)
    with eval_mode(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        run_whole(model, _blank_images(model, 1, image_size))
    return counter.get_total_flops() // 2


def count_uses(model: nn.Module, image_size: tuple[int, int]) -> dict[str, int]:
    """How often one image uses each entry of the weights of convolutions and linear layers, by tensor name.

    That is the number of positions that the layer gives an output for, over all its calls; times the entries of the
    weight it makes the layer's multiply-accumulates. Runs on the meta device, as `count_macs` does.

    Args:
        model: takes images (B, 3, H, W).
        image_size: (height, width) in pixels.
    """
    model = on_meta(model)
    uses: dict[str, int] = {}

    def count(name: str):
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            channels = output.shape[1] if isinstance(layer, nn.modules.conv._ConvNd) else output.shape[-1]
            uses[name] = uses.get(name, 0) + output.numel() // channels

        return hook

    layers = (nn.modules.conv._ConvNd, nn.Linear)
    handles = [
        layer.register_forward_hook(count(f"{name}.weight"))
        for name, layer in model.named_modules()
        if isinstance(layer, layers)
    ]
    with eval_mode(model), torch.no_grad():
        run_whole(model, _blank_images(model, 1, image_size))
    for handle in handles:
        handle.remove()
    return uses


def measure_latency(model: nn.Module, image_size: tuple[int, int], *, warmup: int = 10, repeats: int = 50) -> float:
    """Median time of one image, see `pass_of`, in milliseconds, where the model is.

    Args:
        model: takes images (B, 3, H, W); it stays as it is.
        image_size: (height, width) in pixels.
        warmup: passes before the first that counts, in which kernels are chosen and caches filled.
        repeats: passes that count, each timed alone and waited for.

    Raises:
        ValueError: `repeats` is less than 1.
    """
    if repeats < 1:
        raise ValueError(f"measure_latency: repeats is {repeats}; it must be at least 1")
    run, device = pass_of(model, image_size), _blank_images(model, 0, image_size).device
    (milliseconds,) = time_in_turns([run], warmup, repeats, device)
    return median(milliseconds)


def pass_of(model: nn.Module, image_size: tuple[int, int]) -> Callable[[], object]:
    """A pass of one image through a copy of a model, to be timed: no decoding, no loading, in its own precision.

    A detector is timed as it is deployed, and all in the memory format in which they are loaded, whatever training
    uses: times of two formats differ by half and more.
    """
    model = copy.deepcopy(model).eval()
    deployed = model.deployed() if isinstance(model, Detector) else model
    deployed.to(memory_format=torch.contiguous_format)
    images = _blank_images(deployed, 1, image_size)

    @torch.inference_mode()
    def run() -> object:
        return run_whole(deployed, images)

    return run


def measure_cuts(
    detector: Detector, image_size: tuple[int, int], earlier: int = 0, repeats: int = 30
) -> list[dict[str, float]]:
    """What a detector cost before its cuts, and after each of them, the last of which left it as it is.

    Each is built again for its shape alone, where the detector is; they are timed in turns, in float32.

    Args:
        detector: `students.build` and its cuts made it.
        image_size: (height, width) in pixels.
        earlier: how many of its first cuts are taken for a part of how it was built.
        repeats: passes of each that count, see `measure_latency`.

    Returns:
        `macs`, `params` and `latency_ms` of each.
    """
    device = _blank_images(detector, 0, image_size).device
    stages = [students.rebuild(detector.recipe, detector.plans[:earlier]).to(device)]
    for plan in detector.plans[earlier:]:
        stages.append(copy.deepcopy(stages[-1]))
        students.apply_plan([(stages[-1], plan)])
    times = time_in_turns([pass_of(stage, image_size) for stage in stages], 5, repeats, device)
    return [
        {"macs": count_macs(stage, image_size), "params": count_parameters(stage), "latency_ms": median(taken)}
        for stage, taken in zip(stages, times)
    ]


def time_in_turns(
    passes: list[Callable[[], object]], warmup: int, repeats: int, device: torch.device
) -> list[list[float]]:
    """Milliseconds of each repeat of each pass.

    Passes take turns, so that what else the machine does hits all alike. With several of them each starts its turn with
    a pass that does not count, so that none pays for caches and threads that the one before it left behind.

    Args:
        passes: what to time.
        warmup: passes of each before the first that counts.
        repeats: passes of each that count.
        device: waited for before and after each of them.
    """
    milliseconds: list[list[float]] = [[] for _ in passes]
    for run in passes:
        for _ in range(warmup):
            run()
    for _ in range(repeats):
        for run, taken in zip(passes, milliseconds):
            if len(passes) > 1:
                run()
            _wait_for(device)
            start = time.perf_counter()
            run()
            _wait_for(device)
            taken.append(1000 * (time.perf_counter() - start))
    return milliseconds


def _blank_images(model: nn.Module, batch: int, image_size: tuple[int, int]) -> Tensor:
    """(B, 3, H, W) of zeros on the model's device and in its precision."""
    reference = next(model.parameters(), torch.empty(0))
    return torch.zeros(batch, 3, *image_size, device=reference.device, dtype=reference.dtype)


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
