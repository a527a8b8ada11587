"""A StyleGAN2 generator as official snapshots hold it: modules by class name and attributes, and no code of ours.

An official snapshot brings the source of its classes along; this one brings a line that imports them, so it opens where
the official program lies. G is the same object as G_ema, and D an empty module, since the official loader wants all
three. `interop/safe_pickle.py` reads it as it reads theirs.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from math import log2, sqrt
from typing import Any

from torch import nn

from sdtrain.errors import WeightsError
from sdtrain.interop.network import Network
from sdtrain.models.stylegan2.layers import FIR_TAPS
from sdtrain.models.stylegan2.networks import channels_at
from sdtrain.models.stylegan2.options import GeneratorOptions

CLASSES = "FullyConnectedLayer Generator MappingNetwork SynthesisBlock SynthesisLayer SynthesisNetwork ToRGBLayer"
SOURCE = f"from training.networks import {', '.join(CLASSES.split())}\n"
FORMAT = 6  # of persistent objects, as the official reader asks
PROTOCOL = 4


@dataclass(frozen=True)
class Persistent:
    """A module as the official pickles keep it."""

    name: str
    state: dict[str, Any]


def reconstruct() -> None:
    """Stands for the official function of that purpose, which is not here."""


PythonPickler: Any = pickle._Pickler  # the one whose steps can be replaced


class Writer(PythonPickler):
    """A pickler that calls `Persistent`s what the official program calls them."""

    def reducer_override(self, obj: Any) -> Any:
        if obj is reconstruct:
            return "_reconstruct_persistent_obj"
        if not isinstance(obj, Persistent):
            return NotImplemented
        said = {"type": "class", "version": FORMAT, "module_src": SOURCE, "class_name": obj.name, "state": obj.state}
        return reconstruct, (said,)

    def save_global(self, obj: Any, name: str | None = None) -> None:
        """Write the global of `obj`, that of `reconstruct` without looking for it."""
        if obj is not reconstruct:
            return super().save_global(obj, name)
        self.save("torch_utils.persistence")
        self.save(name)
        self.write(pickle.STACK_GLOBAL)
        self.memoize(obj)


def require_stylegan2(network: Network) -> None:
    """Raises WeightsError for anything but a StyleGAN2 generator."""
    if network.kind != "stylegan2" or network.player != "Generator":
        raise WeightsError(f"format pkl is for StyleGAN2 generators, this is {network.kind}; use official")


def snapshot_bytes(network: Network) -> bytes:
    """The file. Raises WeightsError as `require_stylegan2`, and for tensors that do not fit."""
    require_stylegan2(network)
    data = io.BytesIO()
    G = Tree(network).generator()
    content = {"G": G, "D": nn.Module(), "G_ema": G, "training_set_kwargs": None, "augment_pipe": None}
    Writer(data, PROTOCOL).dump(content)
    return data.getvalue()


class Tree:
    """The official modules of one generator, each with its attributes and constructor arguments."""

    def __init__(self, network: Network) -> None:
        self.net: Any = network.build().requires_grad_(False)
        self.o: GeneratorOptions = network.typed_options
        assert network.resolution is not None
        self.R, self.c_dim = network.resolution, network.num_classes
        # bfloat16 is no format of the official program: its blocks go out in float32
        self.num_fp16_res = self.o.num_low_precision_res if self.o.low_precision == "fp16" else 0

    def module(
        self, name: str, at: str, args: tuple[int, ...], kwargs: dict[str, Any], children: dict[str, Any], **more: Any
    ) -> Persistent:
        """The module of class `name` at the dotted name `at` of ours; `more` are its attributes."""
        own = self.net.get_submodule(at)
        state = {**nn.Module().__dict__, "training": False, "_modules": children, **more}
        state |= {"_parameters": dict(own._parameters), "_buffers": dict(own._buffers)}
        return Persistent(name, {**state, "_init_args": args, "_init_kwargs": kwargs})

    def generator(self) -> Persistent:
        o, num_ws = self.o, self.net.num_ws
        sizes = {"z_dim": o.z_dim, "c_dim": self.c_dim, "w_dim": o.w_dim}
        image = {"img_resolution": self.R, "img_channels": o.img_channels}
        usual = GeneratorOptions()
        mapping: dict[str, Any] = {"num_layers": o.mapping_layers}
        mapping |= {"lr_multiplier": o.mapping_lr_mul} if o.mapping_lr_mul != usual.mapping_lr_mul else {}
        mapping |= {"w_avg_beta": o.w_avg_beta} if o.w_avg_beta != usual.w_avg_beta else {}
        clamp = {} if o.conv_clamp is None else {"conv_clamp": o.conv_clamp}
        synthesis = {"channel_base": o.channel_base, "channel_max": o.channel_max, "num_fp16_res": self.num_fp16_res}
        synthesis |= clamp
        children = {"synthesis": self.synthesis({"w_dim": o.w_dim, **image, **synthesis}, clamp)}
        children["mapping"] = self.mapping({**sizes, "num_ws": num_ws, **mapping})
        kwargs = {**sizes, **image, "mapping_kwargs": mapping, "synthesis_kwargs": synthesis}
        return self.module("Generator", "", (), kwargs, children, **sizes, **image, num_ws=num_ws)

    def mapping(self, kwargs: dict[str, Any]) -> Persistent:
        o, children = self.o, {}
        if self.c_dim:
            children["embed"] = self.linear("mapping.embed", self.c_dim, o.w_dim, {})
        learned = {"activation": "lrelu", "lr_multiplier": o.mapping_lr_mul}
        for i in range(o.mapping_layers):
            width = o.w_dim if i else o.z_dim + (o.w_dim if self.c_dim else 0)
            children[f"fc{i}"] = self.linear(f"mapping.fc{i}", width, o.w_dim, learned)
        said = {**kwargs, "w_avg_beta": o.w_avg_beta}
        said.pop("lr_multiplier", None)
        return self.module("MappingNetwork", "mapping", (), kwargs, children, **said)

    def linear(self, at: str, c_in: int, c_out: int, kwargs: dict[str, Any]) -> Persistent:
        rate = kwargs.get("lr_multiplier", 1)
        gains = {"weight_gain": rate / sqrt(c_in), "bias_gain": rate}
        activation = kwargs.get("activation", "linear")
        return self.module("FullyConnectedLayer", at, (c_in, c_out), kwargs, {}, activation=activation, **gains)

    def affine(self, at: str, c_in: int) -> dict[str, Persistent]:
        return {"affine": self.linear(f"{at}.affine", self.o.w_dim, c_in, {"bias_init": 1})}

    def synthesis(self, kwargs: dict[str, Any], clamp: dict[str, Any]) -> Persistent:
        levels = list(self.net.synthesis.resolutions)
        blocks = {f"b{r}": self.block(r, clamp) for r in levels}
        said = {name: kwargs[name] for name in ("w_dim", "img_resolution", "img_channels")}
        said |= {"img_resolution_log2": int(log2(self.R)), "block_resolutions": levels, "num_ws": self.net.num_ws}
        return self.module("SynthesisNetwork", "synthesis", (), kwargs, blocks, **said)

    def block(self, r: int, clamp: dict[str, Any]) -> Persistent:
        o, at = self.o, f"synthesis.b{r}"
        c_in, c_out = channels_at(r // 2, o) if r > 4 else 0, channels_at(r, o)
        fp16 = self.num_fp16_res > 0 and r >= max((2 * self.R) >> self.num_fp16_res, 8)
        children = {"conv0": self.conv(f"{at}.conv0", c_in, c_out, r, up=2)} if c_in else {}
        children["conv1"] = self.conv(f"{at}.conv1", c_out, c_out, r, up=1)
        rgb = {"w_dim": o.w_dim, "conv_clamp": o.conv_clamp, "channels_last": False}
        children["torgb"] = self.module(
            *("ToRGBLayer", f"{at}.torgb", (c_out, o.img_channels), rgb, self.affine(f"{at}.torgb", c_out)),
            conv_clamp=o.conv_clamp,
            weight_gain=1 / sqrt(c_out),
        )
        kwargs = {"w_dim": o.w_dim, "resolution": r, "img_channels": o.img_channels, "is_last": r == self.R}
        kwargs |= {"use_fp16": fp16}
        said = {**kwargs, "in_channels": c_in, "architecture": "skip", "channels_last": False}
        said |= {"num_conv": 2 if c_in else 1, "num_torgb": 1}
        return self.module("SynthesisBlock", at, (c_in, c_out), {**kwargs, **clamp}, children, **said)

    def conv(self, at: str, c_in: int, c_out: int, r: int, up: int) -> Persistent:
        o = self.o
        doubled = {"up": 2, "resample_filter": [int(tap) for tap in FIR_TAPS]} if up == 2 else {}
        kwargs = {"w_dim": o.w_dim, "resolution": r, **doubled, "conv_clamp": o.conv_clamp, "channels_last": False}
        said = {"resolution": r, "up": up, "use_noise": True, "activation": "lrelu", "conv_clamp": o.conv_clamp}
        said |= {"padding": 1, "act_gain": sqrt(2)}
        return self.module("SynthesisLayer", at, (c_in, c_out), kwargs, self.affine(at, c_in), **said)
