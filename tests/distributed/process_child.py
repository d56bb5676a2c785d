"""One of several processes in the environment of torchrun that train together: METHODS DATA OUT.

Every method trains two tasks on sharded batches; rank 0 writes the trained parameters.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from cnext import methods
from cnext.backbones.tiny.model import TinyBackbone
from cnext.distributed import collectives
from cnext.distributed.processes import process_group, sharded
from cnext.methods.parts.low_rank import LowRank

sys.path.insert(0, str(Path(__file__).parents[1]))
from methods.sequence import VARIANTS, Sequence

TASKS = ("VQAv2", "HQEdit")
CHOSEN = {"keep-lora": {"features": 0.0}}
"""Its protected inputs depend on the padding of shorter batches, as pgp's do, and singular vectors turn with them."""


def learnt(method: str, data: Path) -> dict[str, torch.Tensor]:
    """A method's parameters and state after two tasks."""
    # AdamW amplifies rounding by the scale, and prompt-pool's is of another kind.
    kind = methods.load(VARIANTS.get(method, (method,))[0])
    made = Sequence(method, data, **({"scale": 1.0} if issubclass(kind, LowRank) else {}), **CHOSEN.get(method, {}))
    model = made.tiny.language_model
    whole = sum(p.numel() for p in model.layers[-1].parameters())
    unevenly = made.method.uneven = sharded(model, made.method.adapter_parameters().values())
    for name in TASKS:
        made.learn(name)
    if os.environ.get("ACCELERATE_USE_FSDP") or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        here = sum(getattr(p, "_local_tensor", p).numel() for p in model.layers[-1].parameters())
        kept = sum(p.numel() for name, p in made.method.adapter_parameters().items() if name.startswith("layers.3."))
        assert here - kept <= (whole - kept) / 2, f"{method}: {here} of {whole} numbers of a block, {kept} trained"
    (question,) = made.tiny.encode_prepared([made.tiny.prepare(made.samples(TASKS[0])[0])])
    with unevenly():
        # One rank calls the model more often than the other, as when its answers are longer.
        for _ in range(1 + 2 * collectives.rank()):
            features = made.tiny.question_features([question])
    assert all(torch.equal(one, features[0]) for one in collectives.all_gather(features)), (
        f"{method}: ranks compute different features"
    )
    state = {f"state:{name}": value for name, value in made.method.state_dict().items()}
    tensors = {name: parameter.detach() for name, parameter in made.method.adapter_parameters().items()} | state
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def main() -> None:
    torch.set_num_threads(1)
    methods, data, out = sys.argv[1].split(","), Path(sys.argv[2]), Path(sys.argv[3])
    with process_group("cpu"):
        assert collectives.world_size() == 2
        assert isinstance(TinyBackbone.load(), TinyBackbone)
        for method in methods:
            found = learnt(method, data)
            for name, value in found.items():
                one, other = collectives.all_gather(value.double().reshape(1, -1))
                assert torch.equal(one, other), f"{method}: {name} is not the same in both processes"
            if collectives.rank() == 0:
                save_file(found, out / f"{method}.safetensors")


if __name__ == "__main__":
    main()
    # A thread of gloo that still runs would abort torch's teardown at the interpreter's exit.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
