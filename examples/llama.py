"""A Llama trained in shards: from a size that a laptop's CPU trains in seconds to 8 billion parameters on eight GPUs.

    python examples/llama.py                                  # 0.2 million parameters, two processes on CPUs
    python examples/llama.py --size 1.5B --gpus 1 --precision bf16-mixed --compile
    python examples/llama.py --size 8B --gpus 8 --precision bf16-mixed --compile --activation-checkpointing
    python examples/llama.py --size 8B --gpus 8 --tensor 2    # each layer is split over two GPUs
    python examples/llama.py --size 8B --gpus 8 --weights path/to/Meta-Llama-3-8B

No process ever has the whole model: workers make it block by block, or each reads its part of `--weights`, files of
Hugging Face's format. It reads the text of Python's standard library, byte by byte. At the end its weights are exported
in that format, and it writes a few lines, if it fits into this process.
"""

from __future__ import annotations

import argparse
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import raytrainer as rt


class Size(NamedTuple):
    dim: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int


SIZES = {
    "tiny": Size(64, 4, 4, 2, 192, 256),
    "100M": Size(768, 12, 12, 4, 2048, 256),
    "1.5B": Size(2048, 16, 32, 8, 8192, 128_256),
    "8B": Size(4096, 32, 32, 8, 14_336, 128_256),
}


class Rotary(nn.Module):
    """Turns pairs of a head's numbers by angles that grow with the position."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.width, self.length = width, length
        self.register_buffer("cos", torch.empty(length, width), persistent=False)
        self.register_buffer("sin", torch.empty(length, width), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Called once a module has memory: a table made in __init__ alone would stay unset in one made on_meta."""
        steps = torch.arange(0, self.width, 2, device=self.cos.device) / self.width
        angles = torch.outer(torch.arange(self.length, device=self.cos.device), 500_000.0**-steps).repeat(1, 2)
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        one, two = x.chunk(2, dim=-1)
        length = x.shape[-2]
        return x * self.cos[:length].to(x.dtype) + torch.cat([-two, one], dim=-1) * self.sin[:length].to(x.dtype)


class Block(nn.Module):
    """Attention, with fewer keys and values than queries, and a gated feed-forward layer. Names are Hugging Face's."""

    def __init__(self, size: Size, length: int) -> None:
        super().__init__()
        self.width = size.dim // size.heads
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(size.dim, 1e-5), nn.RMSNorm(size.dim, 1e-5)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(size.dim, size.heads * self.width, bias=False),
                "k_proj": nn.Linear(size.dim, size.kv_heads * self.width, bias=False),
                "v_proj": nn.Linear(size.dim, size.kv_heads * self.width, bias=False),
                "o_proj": nn.Linear(size.heads * self.width, size.dim, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(size.dim, size.hidden, bias=False),
                "up_proj": nn.Linear(size.dim, size.hidden, bias=False),
                "down_proj": nn.Linear(size.hidden, size.dim, bias=False),
            }
        )
        self.rotary = Rotary(self.width, length)

    def forward(self, x: Tensor) -> Tensor:
        attention, mlp, normal = self.self_attn, self.mlp, self.input_layernorm(x)

        def heads(name: str) -> Tensor:
            # as many as there are here: with tensor parallelism each worker has some
            return attention[name](normal).unflatten(-1, (-1, self.width)).transpose(1, 2)

        query, key = self.rotary(heads("q_proj")), self.rotary(heads("k_proj"))
        found = F.scaled_dot_product_attention(query, key, heads("v_proj"), is_causal=True, enable_gqa=True)
        x = x + attention["o_proj"](found.transpose(1, 2).flatten(-2))
        normal = self.post_attention_layernorm(x)
        return x + mlp["down_proj"](F.silu(mlp["gate_proj"](normal)) * mlp["up_proj"](normal))


class Llama(rt.Module):
    """Predicts the next token from those before it."""

    def __init__(self, size: str = "tiny", length: int = 64, lr: float = 3e-4, warmup: int = 10) -> None:
        super().__init__()
        self.save_hyperparameters()
        shape = SIZES[size]
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.dim)
        self.layers = nn.ModuleList(Block(shape, length) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.dim, 1e-5)
        self.lm_head = nn.Linear(shape.dim, shape.vocabulary, bias=False)

    def configure_model(self) -> None:
        """Split layers over the workers of a tensor-parallel group, where there is one."""
        mesh = None if self.device_mesh is None else self.device_mesh["tensor_parallel"]
        if mesh is None or mesh.size() == 1:
            return
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
        plan = {name: ColwiseParallel() for name in columns}
        plan |= {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
        for layer in self.layers:
            parallelize_module(layer, mesh, plan)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))

    def loss(self, tokens: Tensor) -> Tensor:
        logits = self(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_bits", self.loss(batch) / math.log(2), prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        # layers that are split are on another mesh than the rest, which a fused optimizer takes apart
        split = [p for p in self.parameters() if getattr(p, "device_mesh", None) is not None and p.device_mesh.ndim > 1]
        rest = [p for p in self.parameters() if not any(p is other for other in split)]
        groups = [{"params": parameters} for parameters in (rest, split) if parameters]
        fused = self.device.type == "cuda"
        optimizer = torch.optim.AdamW(groups, self.hparams.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)
        warmup = self.hparams.warmup
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @torch.no_grad()
    def generate(self, prompt: str, characters: int, temperature: float = 0.7) -> str:
        """Go on writing after `prompt`; tokens are bytes."""
        tokens = torch.tensor([list(prompt.encode())])
        for _ in range(characters):
            logits = self(tokens[:, -self.hparams.length :])[0, -1, :256]
            chosen = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)
            tokens = torch.cat([tokens, chosen[None]], dim=1)
        return bytes(tokens[0].tolist()).decode(errors="replace")


class Text(Dataset[Tensor]):
    """The standard library's modules, as windows of bytes; every tenth window is held out."""

    def __init__(self, length: int, megabytes: float, held_out: bool) -> None:
        paths = sorted(Path(os.__file__).parent.glob("*.py"), key=lambda path: zlib.crc32(path.name.encode()))
        text = b"".join(path.read_bytes() for path in paths)[: int(megabytes * 1e6)]
        windows = torch.frombuffer(bytearray(text), dtype=torch.uint8).unfold(0, length + 1, length)
        chosen = [index for index in range(len(windows)) if (index % 10 == 0) is held_out]
        self.windows = windows[chosen]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Tensor:
        return self.windows[index].long()


def in_hugging_face(name: str) -> str:
    """What a parameter is called in files of Hugging Face's."""
    return name if name.startswith("lm_head") else f"model.{name}"


def main(arguments: Sequence[str] | None = None) -> float:
    """Train, export, print a sample; return bits per byte on what was held out."""
    parser = argparse.ArgumentParser(description="Train a Llama in shards.")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--gpus", type=int, default=None, help="GPUs; without: processes on CPUs")
    parser.add_argument("--num-processes", type=int, default=2, help="on CPUs")
    parser.add_argument("--tensor", type=int, default=1, help="workers that split each layer")
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=64, help="tokens in a window")
    parser.add_argument("--batch-size", type=int, default=8, help="windows for each group of workers")
    parser.add_argument("--megabytes", type=float, default=1.0, help="how much text to read")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--precision", default="32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--weights", default=None, help="begin with these: a folder of safetensors files")
    parser.add_argument("--resume", default=None, help="go on from this checkpoint")
    parser.add_argument("--sample", type=int, default=200, help="bytes to write at the end")
    parser.add_argument("--root", default="llama", help="where logs, checkpoints and exported weights go")
    args = parser.parse_args(arguments)

    module = rt.on_meta(lambda: Llama(args.size, args.length, args.lr), weights=args.weights, names=in_hugging_face)
    saver = rt.ModelCheckpoint(Path(args.root) / "checkpoints", save_last=True)
    trainer = rt.Trainer(
        strategy=rt.ModelParallel(tensor=args.tensor, activation_checkpointing=args.activation_checkpointing),
        num_processes=None if args.gpus else args.num_processes,
        gpus=args.gpus,
        precision=args.precision,
        compile=args.compile,
        max_steps=args.max_steps,
        gradient_clip_val=1.0,
        val_check_interval=min(50, args.max_steps),
        check_val_every_n_epoch=None,
        limit_val_batches=4,
        log_every_n_steps=10,
        callbacks=[saver],
        default_root_dir=args.root,
        seed=7,
    )
    text = [Text(args.length, args.megabytes, held_out) for held_out in (False, True)]
    train, held_out = (DataLoader(part, batch_size=args.batch_size, shuffle=part is text[0]) for part in text)
    trainer.fit(module, train, held_out, ckpt_path=args.resume)
    bits = float(trainer.callback_metrics["val_bits"])

    rt.export_weights(saver.last_model_path, Path(args.root) / "exported", names=in_hugging_face)
    print(f"\nweights are in {Path(args.root) / 'exported'}")
    if args.size in ("tiny", "100M"):
        whole = Llama.load_from_checkpoint(saver.last_model_path)
        print(f"\n{whole.generate('def ', args.sample)}\n")
    print(f"bits per byte on what was held out: {bits:.2f}")
    return bits


if __name__ == "__main__":
    main()
