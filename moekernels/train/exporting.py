"""`moekernels export`: a run's newest checkpoint as a Hugging Face folder.

Of a run that began with such a folder, in its family and with what lay beside its weights; of any
other in the family that has all it asks for. Experts that lift a token to another width become
plain ones: the lift is linear, so its product with the FFN's matrices is one matrix.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moekernels import files, jsonio
from moekernels.data.tokenizer import END_OF_TEXT, Tokenizer
from moekernels.errors import UsageError
from moekernels.integrations.families import FAMILIES, config_of, decoder_spec, in_their_form
from moekernels.integrations.keys import Part, parts
from moekernels.model.decoder import DecoderSpec
from moekernels.train import folder, resume, shards, weights
from moekernels.train.importing import building, check_place
from moekernels.train.metrics import TOKENIZER
from moekernels.train.report import count
from moekernels.train.weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SHARD = 5_000_000_000  # bytes of a file, one tensor more at the most
KEPT = ""  # the dtype that the weights have


def export(
    run: Path, out: Path, dtype: str = KEPT, family: str | None = None, kind: str = "model"
) -> int:
    """Write the folder; the exit code. `kind`: of weights, see `weights.find`."""
    check_place(out)
    found = weights.find(run, kind=kind)
    held = found.tensors["embedding.weight"].dtype
    names = {"": held, "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    if dtype not in names:
        raise UsageError(f"--dtype {dtype}: use one of fp32, bf16, fp16")
    wanted = names[dtype]
    beside = _beside(found, family)
    config = folder.read_config(beside) if beside else _fitting(found, family)
    with building(out) as partial:
        if beside and found.imported and wanted == held:  # they are the folder's own files
            for name in found.files:
                shards.copy(found.path / name, partial / name)
            if (beside / folder.INDEX).is_file():
                shards.copy(beside / folder.INDEX, partial / folder.INDEX)
        else:
            _write(found, config.model_type, partial, getattr(torch, wanted))
        if beside:
            _copy_beside(beside, partial, None if wanted == held else wanted)
        else:
            _make_beside(found, config, partial, wanted)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    print(
        f"{out}: {config.model_type}, {count(_plain(found.spec).parameters_count())} parameters in "
        f"{wanted}, {size:,} bytes, from {found.path}"
    )
    return 0


def _plain(spec: DecoderSpec) -> DecoderSpec:
    """The same model without a lift."""
    return dataclasses.replace(spec, expert_d_in=0)


def _canonical(spec: DecoderSpec) -> dict[str, Any]:
    """What decides what a model computes, each thing said in one way."""
    fields = dataclasses.asdict(dataclasses.replace(_plain(spec), num_kv_heads=spec.kv_heads))
    for key in resume.MODEL_MAY_CHANGE:
        del fields[key]
    if spec.num_groups == 1:  # nothing to choose
        del fields["group_score"]
    return {**fields, "selection bias": spec.bias_update_rate > 0}


def _beside(found: Weights, family: str | None) -> Path | None:
    """The folder that lay beside the weights, if its configuration is still the model's."""
    if found.beside is None:
        return None
    config = folder.read_config(found.beside)
    same = _canonical(decoder_spec(config)) == _canonical(found.spec)
    return found.beside if same and family in (None, config.model_type) else None


def _fitting(found: Weights, family: str | None) -> PreTrainedConfig:
    """The configuration of the first family that has all that the model asks for."""
    wanted, nearest = _canonical(found.spec), None
    for kind in FAMILIES if family is None else (family,):
        try:
            config = config_of(_plain(found.spec), kind, **_token_numbers(found))
            has = _canonical(decoder_spec(config))
        except UsageError:
            continue
        differs = [key for key in wanted if wanted[key] != has.get(key, wanted[key])]
        if not differs:
            return config
        if nearest is None or len(differs) < len(nearest[1]):
            nearest = kind, differs, has
    if nearest is None:
        raise UsageError(f"{found.named}: no family of transformers has a model of this shape")
    kind, (key, *_), has = nearest
    raise UsageError(
        f"{found.named}: model.{key} is {wanted[key]!r}, and no family of transformers has that "
        f"with the rest of the model; the nearest, {kind}, has {has[key]!r}"
    )


def _token_numbers(found: Weights) -> dict[str, Any]:
    """Beside the model: where texts end, how long they were."""
    context = found.facts.get("run", {}).get("batch", {}).get("context")
    more = {"max_position_embeddings": context} if context else {}
    end = Tokenizer.load(found.tokenizer).end_of_text if found.tokenizer else None
    return {**more, "bos_token_id": None, "eos_token_id": end, "pad_token_id": None}


# --- weights


def _write(found: Weights, family: str, out: Path, dtype: torch.dtype) -> None:
    """The weights in files of about `SHARD` bytes, keys and their order as transformers has them;
    one tensor in memory at a time."""
    every = {part.key: part for part in parts(_plain(found.spec), family)}
    if lacking := [p.name for p in every.values() if p.name not in found.tensors]:
        raise UsageError(f"{found.path}: {lacking[0]} is missing")
    entries = [
        (key, torch.float32 if part.wide else dtype, part.shape)
        for key, part in sorted(every.items())
    ]
    groups: list[list] = [[]]
    room = SHARD
    for key, kind, shape in entries:
        size = torch.Size(shape).numel() * kind.itemsize
        if groups[-1] and size > room:
            groups.append([])
            room = SHARD
        groups[-1].append((key, kind, shape))
        room -= size
    with shards.Reader(found.path) as reader:
        produce = _producer(found, every, reader, dtype)
        placed: dict[str, str] = {}
        for number, group in enumerate(groups, 1):
            name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            name = folder.SINGLE if len(groups) == 1 else name
            group.sort(key=lambda entry: (-entry[1].itemsize, entry[0]))
            shards.write_each(out / name, group, produce, {"format": "pt"})
            placed |= {key: name for key, *_ in group}
    if len(groups) > 1:
        counts = [(torch.Size(shape).numel(), kind.itemsize) for _, kind, shape in entries]
        about = {
            "total_parameters": sum(n for n, _ in counts),
            "total_size": sum(n * size for n, size in counts),
        }
        text = jsonio.dumps({"metadata": about, "weight_map": placed}, indent=2, sort_keys=True)
        files.write(out / folder.INDEX, text + "\n")


def _producer(
    found: Weights, every: dict[str, Part], reader: shards.Reader, dtype: torch.dtype
) -> Callable[[str], Tensor]:
    def box(name: str, begin: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        saved = found.tensors[name]
        x = torch.empty(size, dtype=getattr(torch, saved.dtype))
        if not reader.fill(x, begin, saved):
            raise UsageError(f"{found.path}: {name}: a part of it was never written")
        return x

    def lift(part: Part, which: str) -> Tensor:
        """[I, H] or [H, I] of an expert, fp64."""
        spec, expert = found.spec, part.begin[0]
        shape = {"w_in": (spec.d_in, spec.d_model), "w_out": (spec.d_model, spec.d_in)}[which]
        name = part.name.rpartition(".")[0] + f".{which}"
        return box(name, (expert, 0, 0), (1, *shape))[0].double()

    def produce(key: str) -> Tensor:
        part = every[key]
        if found.spec.lifted and part.name.endswith("experts.w1"):
            x = box(part.name, part.begin, (*part.size[:2], found.spec.d_in))
            x = x[0].double() @ lift(part, "w_in")
        elif found.spec.lifted and part.name.endswith("experts.w2"):
            x = box(part.name, part.begin, (1, found.spec.d_in, part.size[2]))
            x = lift(part, "w_out") @ x[0].double()
        else:
            x = box(part.name, part.begin, part.size)
        x = in_their_form(x, part.form).reshape(part.shape)
        return x.to(torch.float32 if part.wide else dtype)

    return produce


# --- what lies beside them


def _copy_beside(source: Path, out: Path, dtype: str | None) -> None:
    """The source's own files; `dtype`: what config.json is to say where that is another one."""
    for name in folder.BESIDE:
        if name in (folder.INDEX, folder.CONFIG) or not (source / name).is_file():
            continue
        shards.copy(source / name, out / name)
    text = (source / folder.CONFIG).read_text(encoding="utf-8")
    if dtype is not None:
        data = json.loads(text)
        data["dtype" if "torch_dtype" not in data else "torch_dtype"] = dtype
        text = jsonio.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    files.write(out / folder.CONFIG, text)


def _make_beside(found: Weights, config: PreTrainedConfig, out: Path, dtype: str) -> None:
    from transformers import GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.dtype = dtype
    files.write(out / folder.CONFIG, config.to_json_string())
    files.write(
        out / folder.GENERATION, GenerationConfig.from_model_config(config).to_json_string()
    )
    if found.tokenizer is None:
        return
    Tokenizer.load(found.tokenizer).save(out / TOKENIZER)
    if not (out / "tokenizer_config.json").exists():
        about = {"eos_token": END_OF_TEXT, "tokenizer_class": "PreTrainedTokenizerFast"}
        files.write(out / "tokenizer_config.json", jsonio.dumps(about, indent=2) + "\n")
