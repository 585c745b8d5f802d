"""Several processes as one run: torchrun's group, rows of a batch, means over ranks, sharded networks and states."""

import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vidistill.io import write_json
from vidistill.ops.device import accelerator
from vidistill.ops.sequence import SequenceGroup

log = logging.getLogger("vidistill")
T = TypeVar("T")

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PARALLEL = ("replicate", "shard")
INFO = "info.json"
NEXT = ".next"  # ends the name of a sharded state that is being written, beside the one it replaces
SCALAR = "()"  # ends the stored name of a tensor without axes, which is written as one of length 1


def launched() -> bool:
    """Whether torchrun (or what sets the same variables) started this process as one of several."""
    return all(name in os.environ for name in TORCHRUN) and int(os.environ["WORLD_SIZE"]) > 1


@contextmanager
def group() -> Iterator[None]:
    """Inside, the processes that torchrun started are one group, gloo on CPUs and nccl on GPUs; alone, nothing."""
    if grouped() or not launched():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    level = log.level
    if rank():
        log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)
        dist.destroy_process_group()


def grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process among all of the run; 0 alone, and the one that writes logs and exports."""
    return dist.get_rank() if grouped() else 0


def world_size() -> int:
    return dist.get_world_size() if grouped() else 1


@dataclass(frozen=True)
class Part:
    """Rows of a global batch: share `index` of `count` equal ones."""

    index: int = 0
    count: int = 1

    def rows(self, x: Tensor) -> Tensor:
        """This part of `x` [B, ...]."""
        if self.count == 1:
            return x
        size = x.shape[0] // self.count
        return x[self.index * size : (self.index + 1) * size]

    def draws(self, rows: int) -> AbstractContextManager[Any]:
        """Inside, random numbers for the `rows` rows of this part are those that they get in the global batch."""
        return nullcontext() if self.count == 1 else BatchDraws(self, rows)


def parts(batch: int, accumulate: int, sequence: int = 1) -> list[Part]:
    """The parts of a global batch that this rank works through, one a micro-batch; ValueError if it does not split.

    `sequence` neighbouring ranks work on the same rows (see `sequence_group`).
    """
    count = world_size() // sequence * accumulate
    if batch % count:
        raise ValueError(
            f"batch {batch} cannot be split among {world_size() // sequence} processes x {accumulate} micro-batches; "
            f"choose a multiple of {count}"
        )
    return [Part(rank() // sequence * accumulate + k, count) for k in range(accumulate)]


def sequence_group(sequence: int) -> SequenceGroup | None:
    """The `sequence` neighbouring ranks that share the tokens of every frame; None for 1.

    Together with the rows of a batch they make a mesh of two axes, `data` x `sequence`; parameters are sharded over
    both. ValueError unless the number of processes is a multiple of it.
    """
    if sequence == 1:
        return None
    if world_size() % sequence:
        raise ValueError(
            f"sequence {sequence} does not divide {world_size()} processes: start a multiple of it with torchrun, or "
            "set sequence=1"
        )
    from torch.distributed.device_mesh import init_device_mesh

    size = (world_size() // sequence, sequence)
    mesh = init_device_mesh(accelerator().type, size, mesh_dim_names=("data", "sequence"))
    return SequenceGroup.of(mesh["sequence"].get_group())


class BatchDraws(TorchFunctionMode):
    """Draws from a passed generator are made for the global batch, and the rows of one part are handed out.

    So a batch trains the same however it is split, and every process draws for all. A draw of a single integer is a
    decision, the same everywhere. Rows that draw for themselves (`diffusion.RowGenerator`) do not need it.
    """

    def __init__(self, part: Part, rows: int) -> None:
        super().__init__()
        self.part, self.num_rows = part, rows

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.randn, torch.rand, torch.randint) or kwargs.get("generator") is None:
            return func(*args, **kwargs)
        sized = isinstance(args[-1], Sequence)
        size, before = (tuple(args[-1]), args[:-1]) if sized else (tuple(args), ())
        if func is torch.randint and size == (1,):
            return func(*args, **kwargs)
        assert size[0] % self.num_rows == 0, f"a draw of {size} is not for {self.num_rows} rows"
        return self.part.rows(func(*before, (size[0] * self.part.count, *size[1:]), **kwargs))


def mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means of numbers over `rows`, one a micro-batch, and over all ranks."""
    if len(rows) == 1 and world_size() == 1:
        return rows[0]
    total = torch.tensor([list(row.values()) for row in rows], dtype=torch.float64).mean(0)
    if world_size() > 1:
        dist.all_reduce(total)
    return dict(zip(rows[0], (total / world_size()).tolist(), strict=True))


def largest(value: int) -> int:
    """The largest of a number that every rank has, for decisions that must agree."""
    if world_size() == 1:
        return value
    shared = torch.tensor(value)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def all_do(act: Callable[[], T], otherwise: Exception) -> T:
    """Let every rank act; where one fails, all end: with their own error, or with `otherwise`."""
    error = None
    try:
        made = act()
    except (OSError, ValueError, RuntimeError) as caught:
        error = caught
    if largest(int(error is not None)):
        raise error or otherwise
    return made


def first_does(act: Callable[[], T]) -> T | None:
    """Let rank 0 act and return what it made, None elsewhere; where it fails, every rank ends with an error."""
    return all_do(act if rank() == 0 else lambda: None, RuntimeError("the first process could not go on; it says why"))


def first_says(act: Callable[[], T]) -> T:
    """As `first_does`, and every rank gets what rank 0 made."""
    made: list[Any] = [first_does(act)]
    if world_size() > 1:
        dist.broadcast_object_list(made)
    return made[0]


@torch.no_grad()
def mean_gradients(params: Iterable[nn.Parameter], accumulate: int) -> None:
    """Turn gradients summed over micro-batches into means over these and over ranks (sharded ones are that already)."""
    grads = [p.grad for p in params if p.grad is not None]
    if accumulate > 1:
        for g in grads:
            g.div_(accumulate)
    plain = [g for g in grads if not is_sharded(g)]
    if world_size() == 1 or not plain:
        return
    flat = torch.cat([g.flatten() for g in plain])
    dist.all_reduce(flat)
    for g, total in zip(plain, flat.split([g.numel() for g in plain]), strict=True):
        g.copy_(total.view_as(g) / world_size())


class SetAside:
    """The parameters of a network, replaced in it by ones of `dtype` that take no memory until they are shards.

    So a rank never holds more of the network than its shards and one tensor, where the parameters are mapped from a
    file. Until then modules may be added; their own parameters come along as they are.
    """

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        self.values: dict[int, Tensor] = {}  # id of a parameter of the network now -> what it stands for
        for module in net.modules():
            for name, p in module.named_parameters(recurse=False):
                empty = torch.zeros((), dtype=dtype).expand(p.shape)  # of the device and type that LoRA asks for
                placeholder = nn.Parameter(empty, p.requires_grad)
                module.register_parameter(name, placeholder)
                self.values[id(placeholder)] = p.detach()

    def to_meta(self, net: nn.Module) -> dict[str, Tensor]:
        """Turn the replaced parameters of `net` into ones that fully_shard takes; their values by name."""
        waiting = {name: self.values[id(p)] for name, p in net.named_parameters() if id(p) in self.values}
        for name in waiting:
            module, _, own = name.rpartition(".")
            p = net.get_parameter(name)
            empty = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
            net.get_submodule(module).register_parameter(own, empty)
        self.values.clear()
        return waiting


@torch.no_grad()
def fill(net: nn.Module, waiting: dict[str, Tensor]) -> None:
    """Give the sharded parameters of `net` on the meta device this rank's part of their values, which are let go."""
    from torch.distributed.tensor import distribute_tensor

    state = net.state_dict()
    for name in list(waiting):
        p: Any = state[name]
        whole = waiting.pop(name)
        spread = distribute_tensor(whole.to(p.device_mesh.device_type), p.device_mesh, p.placements, src_data_rank=None)
        state[name] = spread.to(p.dtype, copy=True)  # else a view of the file
    net.load_state_dict(state, assign=True)


def shard(
    net: nn.Module,
    units: Iterable[list[nn.Module]],
    gather: torch.dtype = torch.float32,
    group: int = 0,
    aside: SetAside | None = None,
) -> None:
    """Spread the parameters of `net` over all ranks, in place, gathered unit by unit; alone, nothing.

    Those set `aside` get their values then, each rank its part.

    `group` neighbouring ranks, those of a node, hold one copy among them, and gradients are summed over all copies
    (HSDP): weights are then gathered inside a node only. 0: one copy among all; ValueError where it does not divide.
    Modules of a unit run one after the other, and units lie in `net`, inner ones first. What is left of it is gathered
    by its own forward, through which it must be called. Weights are gathered in `gather`: in bfloat16 half as much is
    sent, and all that a pass computes outside autocast sees rounded weights too; gradients are summed in float32.

    Source: FSDP2, `torch.distributed.fsdp.fully_shard`.
    """
    if world_size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy()
    if gather != torch.float32:  # inputs keep their type: a noise level in bfloat16 would be another one
        policy = MixedPrecisionPolicy(param_dtype=gather, reduce_dtype=torch.float32, cast_forward_inputs=False)
    where = accelerator().type
    if world_size() % (group or 1):
        raise ValueError(f"shard_group {group} does not divide {world_size()} processes: choose a divisor, or 0")
    mesh = init_device_mesh(where, (world_size(),))
    if 0 < group < world_size():
        mesh = init_device_mesh(where, (world_size() // group, group), mesh_dim_names=("copies", "shards"))
    # keys of a prompt are views; nothing here writes into what a layer returns
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view")
    waiting = {} if aside is None else aside.to_meta(net)
    for unit in (*units, [net]):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        for module in unit if where == "cpu" else ():  # gloo has no mean
            sharded: Any = module
            sharded.set_force_sum_reduction_for_comms(True)
    if waiting:
        fill(net, waiting)


def sync_gradients(nets: Iterable[nn.Module], on: bool) -> None:
    """Whether coming backward passes of sharded networks sum gradients over ranks; else each rank keeps them whole."""
    if world_size() == 1:
        return
    from torch.distributed.fsdp import FSDPModule

    for net in nets:
        if isinstance(net, FSDPModule):
            net.set_requires_gradient_sync(on)


def is_sharded(x: Tensor) -> bool:
    if world_size() == 1:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def whole_state(net: nn.Module) -> dict[str, Tensor]:
    """The state dict of `net` in one piece, on the CPU; every rank must ask, rank 0 is answered."""
    state = {}
    for name, x in net.state_dict().items():
        full = x.full_tensor() if is_sharded(x) else x
        if rank() == 0:
            state[name] = full.cpu()
    return state


def shaped_like(x: Tensor, template: Tensor) -> Tensor:
    """`x` on the device of `template`, this rank's part if that is sharded; `x` itself if its shape is another."""
    if x.shape != template.shape:
        return x
    if not is_sharded(template):
        return x.to(template.device)
    from torch.distributed.tensor import distribute_tensor

    spread: Any = template
    return distribute_tensor(x.to(spread.device), spread.device_mesh, spread.placements, src_data_rank=None)


def placed(tensors: Mapping[str, Tensor], templates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` as their templates lie, which are called as them or as them without the last part of the name."""
    return {n: shaped_like(t, templates.get(n, templates.get(n.rpartition(".")[0], t))) for n, t in tensors.items()}


def save_shards(folder: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write a state of `info["step"]` under `folder`, every rank its shards, and then drop older ones.

    Safetensors through `torch.distributed.checkpoint`, written beside what is there and compared with what was meant; a
    state is complete once its info.json is there, which holds the checksums of all files. Until then the state before
    it stays, even one of the same step. OSError, on every rank, if the files are not what was meant.
    """
    import torch.distributed.checkpoint as dcp

    path = folder / f"state-{info['step']:08d}"
    new = path.with_name(path.name + NEXT)
    first_does(lambda: swap(new, path) if (new / INFO).is_file() else shutil.rmtree(new, ignore_errors=True))
    flat = {f"{n}{SCALAR}" if t.ndim == 0 else n: t.reshape(1) if t.ndim == 0 else t for n, t in tensors.items()}
    before = next((str(found) for found, _ in complete_shards(folder)), "none before it")
    with raised_by_all(f"the state of step {info['step']} was not written (there is {before})"):
        dcp.save(flat, storage_writer=dcp.HuggingFaceStorageWriter(str(new), save_distributed=True))
    check_written(new, flat)
    files = checksums(new)

    def complete() -> None:
        record = {**info, "files": files}
        write_json(new / INFO, {**record, "checksum": text_checksum(record)})
        swap(new, path)
        drop_shards(folder, keep=path)

    first_does(complete)


def check_written(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """OSError, on every rank, unless the shards in `path` hold what `tensors` hold, all of it."""
    held, fault, file = 0, "", path
    try:  # a file that disappears while it is read raises RuntimeError, as torch maps it
        for file in path.glob(f"shard-{rank() + 1:05d}-*.safetensors"):
            with safe_open(file, framework="pt") as shards:
                for name in shards.keys():  # noqa: SIM118
                    mine: Any = tensors[name]
                    part = (mine.to_local() if is_sharded(mine) else mine).detach().cpu()
                    found, held = shards.get_tensor(name), held + part.numel()
                    if found.shape != part.shape or not same_bits(found, part):
                        raise ValueError(f"{name} is not what was written")
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        fault = f"{file}: {error}"
    total = torch.tensor([held, int(bool(fault))])
    if world_size() > 1:
        dist.all_reduce(total)
    if total[1] or int(total[0]) != sum(x.numel() for x in tensors.values()):
        raise OSError(f"{fault or path}: the state is not whole on disk; what was there before is untouched")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have the same type and bits."""
    return a.dtype == b.dtype and torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)))


def swap(new: Path, path: Path) -> None:
    """Let the complete state `new` be the one at `path`; wherever this is cut short, `complete_shards` finds it."""
    shutil.rmtree(path, ignore_errors=True)
    os.replace(new, path)


@contextmanager
def raised_by_all(what: str) -> Iterator[None]:
    """Inside, what torch's checkpoints cannot do on one rank is an OSError on all of them that begins with `what`."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:  # a BaseException, of many lines
        number, (cause, _) = next(iter(error.failures.items()))
        raise OSError(f"{what}: {cause} (process {number})") from error


def checksums(path: Path) -> dict[str, str]:
    """SHA-256 of every weight file that rank 0 sees in `path`; the ranks share the reading, and all must ask."""
    names = first_says(lambda: sorted(p.name for p in path.glob("*.safetensors")))
    sums = torch.zeros(len(names), 32, dtype=torch.uint8)

    def read_share() -> None:
        for i in range(rank(), len(names), world_size()):
            with open(path / names[i], "rb") as file:
                sums[i] = torch.tensor(list(hashlib.file_digest(file, "sha256").digest()), dtype=torch.uint8)

    all_do(read_share, OSError(f"{path}: another process of the run could not read its weights; it says why"))
    if world_size() > 1:
        dist.all_reduce(sums)
    return {name: bytes(row.tolist()).hex() for name, row in zip(names, sums, strict=True)}


def text_checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def read_info(path: Path) -> dict[str, Any]:
    """The info of the shards in `path`; ValueError if a file of them is not what was written. All ranks must ask.

    Shards of earlier versions carry no checksums.
    """
    info, files = first_says(lambda: parse_info(path))
    found = None if files is None else checksums(path)
    for name in sorted(set(files or {}) | set(found or {})):
        if (files or {}).get(name) != (found or {}).get(name):
            raise ValueError(f"{path / name} is damaged, missing or of another state; restore it, or remove {path}")
    return info


def parse_info(path: Path) -> tuple[dict[str, Any], dict[str, str] | None]:
    """The info of the shards in `path`, and the checksums of their files where it carries them."""
    damaged = f"{path / INFO} is damaged; restore the state, or remove it"
    try:
        info = json.loads((path / INFO).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{damaged} ({error})") from error
    checksum = info.pop("checksum", None) if isinstance(info, dict) else ""
    if checksum is not None and checksum != text_checksum(info):
        raise ValueError(damaged)
    files = info.pop("files", None)
    return info, None if checksum is None else files or {}


def drop_shards(folder: Path, keep: Path | None = None) -> None:
    """Remove the sharded states under `folder` other than `keep`."""
    for old in folder.glob("state-*/"):
        if old != keep:
            shutil.rmtree(old)


def complete_shards(folder: Path) -> list[tuple[Path, int]]:
    """The sharded states under `folder` that were written to their end, and their steps, the newest first."""
    named = []
    for info in folder.glob(f"state-*/{INFO}"):
        if name := re.fullmatch(rf"state-(\d+)({re.escape(NEXT)})?", info.parent.name):
            named.append((info.parent, int(name[1]), name[2] or ""))
    return [(path, step) for path, step, _ in sorted(named, key=lambda state: state[1:], reverse=True)]


def read_shards(path: Path, templates: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_shards` wrote, for any number of processes, and its info.

    `templates` {name, or name without its last part: tensor} say where each tensor lies and how it is sharded.
    """
    import torch.distributed.checkpoint as dcp

    info = read_info(path)
    reader = dcp.HuggingFaceStorageReader(str(path))
    empty: dict[str, Tensor] = {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        meta: Any = stored
        template = templates.get(name, templates.get(name.rpartition(".")[0]))
        if template is not None and not name.endswith(SCALAR) and template.shape != meta.size:
            raise RuntimeError(f"{name} is {list(meta.size)} there, {list(template.shape)} here")
        if template is None or name.endswith(SCALAR):
            empty[name] = torch.zeros(meta.size, dtype=meta.properties.dtype)
        else:
            empty[name] = torch.zeros_like(template.detach(), dtype=meta.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*intent is to load in a single process")  # it is
        dcp.load(empty, storage_reader=reader)
    tensors = {n.removesuffix(SCALAR): t.reshape(()) if n.endswith(SCALAR) else t for n, t in empty.items()}
    return tensors, info
