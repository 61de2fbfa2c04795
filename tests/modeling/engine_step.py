"""Two processes under real engines: gradients through `vocab_request` against dense gradients of one process.

Run as a script by test_engines.py: ``torchrun --nproc_per_node 2 engine_step.py OUT ENGINE,ENGINE...``. Writes, by
engine and kind of head, the largest relative difference of any parameter's gradient in two passes, and what else the
test asserts.
"""

import contextlib
import copy
import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.kernels import kept
from posttrain.modeling import StatisticsGroup, VocabRequest, attach, check_head
from posttrain.modeling.engines import whole
from tests.modeling import families

warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
KINDS = {
    "untied": (False, None),
    "tied": (True, None),
    "lora": (False, {"target_modules": ["lm_head", "q_proj"]}),
    "copy": (False, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
}
ROWS = 4
GROUP = (StatisticsGroup(("logp", "entropy")),)


def build(kind):
    tied, options = KINDS[kind]
    model = families.model("granite", tied=tied).float()
    if options is not None:
        model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.0, task_type="CAUSAL_LM", **options))
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def batch_of(rank, world, number):
    inputs = families.batch(rows=ROWS, seed=10 + number)
    return {name: tensor.chunk(world)[rank] for name, tensor in inputs.items()}


def truth(kind, number):
    """Dense gradients of the whole batch in one process, by logits of the model itself."""
    model = build(kind)
    inputs = batch_of(0, 1, number)
    index, targets = families.targets(inputs)
    rows = model(**inputs).logits.flatten(0, 1)[index].log_softmax(-1)
    entropy = -(rows.exp() * rows).sum(-1)
    (rows[torch.arange(len(targets)), targets] + 0.5 * entropy).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Plain:
    """DDP, and what the sharding engines share with it: they average over the ranks."""

    def __init__(self, model):
        self.model = torch.nn.parallel.DistributedDataParallel(model)
        self.plain = model

    def backward(self, loss):
        loss.backward()

    def gradients(self):
        found = {}
        for name, parameter in self.plain.named_parameters():
            gradient = parameter.grad
            if gradient is not None:
                found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()
        self.plain.zero_grad()
        return found

    def values(self):
        local = {n: p.to_local() if isinstance(p, DTensor) else p for n, p in self.plain.named_parameters()}
        return {name: tensor.detach().clone() for name, tensor in local.items()}


class Fsdp(Plain):
    """Units as a user would choose them: every layer, the head by itself, and the rest."""

    def __init__(self, model):
        for module in model.modules():
            if type(module).__name__ == "GraniteDecoderLayer":
                fully_shard(module)
        base = attach(model)
        if base.get_output_embeddings().weight is not base.get_input_embeddings().weight:
            fully_shard(base.get_output_embeddings())
        self.model = self.plain = fully_shard(model)
        assert any(isinstance(p, DTensor) for p in model.parameters())


class FsdpOfAccelerate(Plain):
    """Units as accelerate chooses them, among them one for each adapter and one for norm and head together."""

    def __init__(self, model):
        from accelerate import FullyShardedDataParallelPlugin
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["GraniteDecoderLayer"],
            reshard_after_forward=True,
        )
        accelerator = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin),
            mixed_precision="no",
            is_main_process=dist.get_rank() == 0,
            device=torch.device("cpu"),
            parallelism_config=None,
        )
        self.model = self.plain = fsdp2_prepare_model(accelerator, model)
        assert isinstance(self.model, FSDPModule)


class Zero3(Plain):
    """DeepSpeed with every parameter partitioned."""

    def __init__(self, model):
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
        }
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.0)
        self.model, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.plain = model
        assert all(p.numel() == 0 for p in model.parameters())

    def backward(self, loss):
        self.model.backward(loss)

    def gradients(self):
        from deepspeed.utils import safe_get_full_grad

        found = {n: safe_get_full_grad(p).clone() for n, p in self.plain.named_parameters() if p.requires_grad}
        self.model.step()
        return found

    def values(self):
        return {name: p.ds_tensor.detach().clone() for name, p in self.plain.named_parameters()}


ENGINES = {"ddp": Plain, "fsdp2": Fsdp, "fsdp2_accelerate": FsdpOfAccelerate, "zero3": Zero3}


def largest_difference(found, expected):
    """Relative to the largest gradient of the same parameter; infinite where a parameter has none."""
    if found.keys() != expected.keys():
        return float("inf")
    return max(float((found[n] - g).abs().max() / g.abs().max().clamp(min=1e-6)) for n, g in expected.items())


def run(engine_name, kind):
    rank, world = dist.get_rank(), dist.get_world_size()
    expected = [truth(kind, number) for number in range(2)]
    plain = build(kind)
    attach(plain)
    engine = ENGINES[engine_name](copy.deepcopy(plain))
    before = engine.values()
    engine.model.train()
    checked = check_head(engine.model, **batch_of(rank, world, 0))
    restored = all(torch.equal(tensor, before[name]) for name, tensor in engine.values().items())
    differences = []
    for number in range(2):
        inputs = batch_of(rank, world, number)
        index, targets = families.targets(inputs)
        answer = engine.model(**inputs, vocab_request=VocabRequest(index, targets, GROUP))
        statistics = answer.statistics[0]
        engine.backward((statistics["logp"] + 0.5 * statistics["entropy"]).sum() * world)
        differences.append(largest_difference(engine.gradients(), expected[number]))
        if number == 0:
            # An evaluation in between, by logits, changes the order in which ZeRO-3 has seen the modules.
            with torch.no_grad():
                engine.model(**inputs)
    inputs = batch_of(rank, world, 0)
    index, targets = families.targets(inputs)
    with torch.no_grad():
        asked = VocabRequest(index, targets, return_hidden=True, return_head=True)
        answer = engine.model(**inputs, vocab_request=asked)
        own = plain(**inputs, vocab_request=asked)
    head = float((answer.head.weight - own.head.weight).abs().max())
    result = {"gradients": differences, "check": checked, "restored": restored, "head": head}
    return {**result, "training": engine.model.training, "gathers": gathers_by_tile(engine)}


class Gathers(TorchDispatchMode):
    """Counts the collectives that gather parameters."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "allgather" in str(func)
        return func(*args, **(kwargs or {}))


def gathers_by_tile(engine):
    """Gathers of a forward and backward with one tile, and with many tiles, of which each rank has its own number."""
    rank, world = dist.get_rank(), dist.get_world_size()
    inputs = batch_of(rank, world, 0)
    # and its own number of tokens
    index, targets = (tensor[: 2 + 3 * rank] for tensor in families.targets(inputs))
    counts, original = [], kept.tile_shape
    # The first of three follows a forward without backward, after which FSDP2 may still hold what it gathered.
    for tile in ((1000, 10**6), (1000, 10**6), (1 + rank, 3 + 4 * rank)):
        kept.tile_shape = lambda *_, tile=tile: tile
        with Gathers() as gathers:
            answer = engine.model(**inputs, vocab_request=VocabRequest(index, targets, GROUP))
            engine.backward(answer.statistics[0]["logp"].sum())
        engine.gradients()
        counts.append(gathers.count)
    kept.tile_shape = original
    return counts[1:]


def gradient_of_a_shard():
    """How far the gradient through `whole` is from the average of what the ranks ask for."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parameter = torch.nn.Parameter(distribute_tensor(torch.arange(12.0).view(6, 2), mesh, [Shard(0)]))
    (whole(parameter) * (1.0 + 2.0 * dist.get_rank())).sum().backward()
    return float((parameter.grad.full_tensor() - 2.0).abs().max())


def main():
    out, engines = sys.argv[1:3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {"shard": gradient_of_a_shard()}
    for engine in engines.split(","):
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, {kind: run(engine, kind) for kind in KINDS})
        found[engine] = gathered
        if dist.get_rank() == 0:
            Path(out).write_text(json.dumps(found))
    dist.barrier()
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
