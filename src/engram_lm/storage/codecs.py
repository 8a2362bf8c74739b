"""Codecs: how the numbers of a row become bytes, and how far the bytes may be from them (docs/format.md).

The functions here are the plain twins, whole arrays in NumPy; `storage.kernels.decode` gathers and decodes in one pass.
Records are uint8 [N, record_bytes]: codes, then scales. Rows are float32 [N, width].
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from engram_lm.errors import ConfigError

E4M3_MAX = 448.0
BF16_MAX = float.fromhex("0x1.fep127")
_FLOAT_MAX = float(np.finfo(np.float32).max)
BLOCK = 32  # numbers that share an e8m0 scale


@dataclass(frozen=True)
class Codec:
    """Base of the codecs. `trains`: rows may be changed in place without a scale to keep."""

    id: ClassVar[int]
    name: ClassVar[str]
    trains: ClassVar[bool] = False

    def record_bytes(self, width: int) -> int:
        """Bytes of one row. ConfigError for a width the codec cannot hold."""
        raise NotImplementedError

    def encode(self, rows_NW: np.ndarray, *, scale: float = 1.0) -> np.ndarray:
        """uint8 [N, record_bytes] from float32 [N, width], to nearest, ties to even."""
        raise NotImplementedError

    def decode(self, records_NR: np.ndarray, *, scale: float = 1.0) -> np.ndarray:
        """float32 [N, width]."""
        raise NotImplementedError

    def error_bound(self, rows_NW: np.ndarray, *, scale: float = 1.0) -> np.ndarray:
        """The most that decode(encode(x)) may differ from x, float64 [N, width]."""
        raise NotImplementedError


class Fp32(Codec):
    id, name, trains = 1, "fp32", True

    def record_bytes(self, width: int) -> int:
        return 4 * width

    def encode(self, rows_NW: np.ndarray, *, scale: float = 1.0) -> np.ndarray:
        return np.ascontiguousarray(rows_NW, dtype="<f4").view(np.uint8)

    def decode(self, records_NR: np.ndarray, *, scale: float = 1.0) -> np.ndarray:
        return np.ascontiguousarray(records_NR).view("<f4")

    def error_bound(self, rows_NW: np.ndarray, *, scale: float = 1.0) -> np.ndarray:
        return np.zeros(rows_NW.shape)


class Bf16(Codec):
    id, name, trains = 2, "bf16", True

    def record_bytes(self, width: int) -> int:
        return 2 * width

    def encode(self, rows_NW: np.ndarray, *, scale: float = 1.0) -> np.ndarray:
        bits = bf16_bits(rows_NW)
        lost = ((bits & 0x7FFF) == 0x7F80) & np.isfinite(rows_NW)
        if lost.any():
            raise ConfigError(f"{self.name} holds numbers up to {BF16_MAX:g}; got {rows_NW[lost][0]:g}.")
        return bits.view(np.uint8)

    def decode(self, records_NR: np.ndarray, *, scale: float = 1.0) -> np.ndarray:
        return bf16_values(np.ascontiguousarray(records_NR).view("<u2"))

    def error_bound(self, rows_NW: np.ndarray, *, scale: float = 1.0) -> np.ndarray:
        return np.maximum(np.abs(rows_NW.astype(np.float64)) * 2.0**-8, 2.0**-134)


class Fp8Blocks(Codec):
    id, name = 3, "fp8_e4m3_e8m0"

    def record_bytes(self, width: int) -> int:
        if width % BLOCK:
            raise ConfigError(f"{self.name} needs rows of a multiple of {BLOCK} numbers; got {width}.")
        return width + width // BLOCK

    def encode(self, rows_NW: np.ndarray, *, scale: float = 1.0) -> np.ndarray:
        N, W = rows_NW.shape
        self.record_bytes(W)
        _finite(rows_NW, self.name)
        blocks_NKB = rows_NW.astype(np.float64).reshape(N, W // BLOCK, BLOCK)
        largest_NK = np.abs(blocks_NKB).max(-1, initial=0.0)
        # the smallest power of two that brings the largest number to 448 or below
        mantissa_NK, exponent_NK = np.frexp(largest_NK / E4M3_MAX)
        exponent_NK = np.where(largest_NK == 0, 0, exponent_NK - (mantissa_NK == 0.5))
        exponent_NK = np.clip(exponent_NK, -127, 127)
        codes_NKB = e4m3_codes(np.ldexp(blocks_NKB, -exponent_NK[..., None]))
        if largest_NK.max(initial=0.0) > _FLOAT_MAX / 2:
            decoded_NKB = np.ldexp(_MAGNITUDE[codes_NKB], exponent_NK[..., None])
            _representable(rows_NW, decoded_NKB.reshape(N, W), self.name)
        codes = codes_NKB.reshape(N, W)
        return np.concatenate([codes, (exponent_NK + 127).astype(np.uint8)], axis=1)

    def decode(self, records_NR: np.ndarray, *, scale: float = 1.0) -> np.ndarray:
        N, R = records_NR.shape
        W = R * BLOCK // (BLOCK + 1)
        scales_NK = e8m0_values(records_NR[:, W:])
        # bytes of others may hold products beyond float32: infinite, as the kernels have them
        with np.errstate(over="ignore"):
            return (E4M3[records_NR[:, :W]].reshape(N, W // BLOCK, BLOCK) * scales_NK[..., None]).reshape(
                N, W
            )

    def error_bound(self, rows_NW: np.ndarray, *, scale: float = 1.0) -> np.ndarray:
        absolute = np.abs(rows_NW.astype(np.float64))
        N, W = rows_NW.shape
        largest = absolute.reshape(N, W // BLOCK, BLOCK).max(-1, initial=0.0).repeat(BLOCK, -1)
        return np.maximum(np.maximum(absolute * 2.0**-4, largest * 2.0**-17), 2.0**-137)


class Fp8(Codec):
    id, name = 4, "fp8_e4m3"

    def record_bytes(self, width: int) -> int:
        return width

    def encode(self, rows_NW: np.ndarray, *, scale: float = 1.0) -> np.ndarray:
        _finite(rows_NW, self.name)
        # as decode has it, and as a header keeps it
        scale = float(np.float32(scale))
        scaled = rows_NW.astype(np.float64) / scale
        largest = np.abs(scaled).max(initial=0.0)
        if largest > E4M3_MAX:
            raise ConfigError(
                f"{self.name} with scale {scale:g} holds numbers up to {E4M3_MAX * scale:g}; got {largest * scale:g}. "
                f"Use a scale of at least {largest * scale / E4M3_MAX * 1.00001:.6g}."
            )
        codes = e4m3_codes(scaled)
        if E4M3_MAX * scale > _FLOAT_MAX:
            _representable(rows_NW, _MAGNITUDE[codes] * scale, self.name)
        return codes

    def decode(self, records_NR: np.ndarray, *, scale: float = 1.0) -> np.ndarray:
        with np.errstate(over="ignore"):
            return E4M3[records_NR] * np.float32(scale)

    def error_bound(self, rows_NW: np.ndarray, *, scale: float = 1.0) -> np.ndarray:
        bound = np.maximum(np.abs(rows_NW.astype(np.float64)) * 2.0**-4, 2.0**-10 * scale)
        # the product of code and scale is rounded to float32
        return bound * (1 + 2.0**-20) + 2.0**-150


CODECS: dict[str, Codec] = {codec.name: codec for codec in (Fp32(), Bf16(), Fp8Blocks(), Fp8())}
CODEC_BY_ID: dict[int, Codec] = {codec.id: codec for codec in CODECS.values()}


def codec_named(name: str) -> Codec:
    """ConfigError, with the names there are, for another."""
    if name not in CODECS:
        raise ConfigError(f"Unknown codec {name!r}; this build has {', '.join(CODECS)}.")
    return CODECS[name]


# ---- numbers ---------------------------------------------------------------------------------------------------------


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """uint16 of bfloat16, to nearest, ties to even; a NaN stays one."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, (bits >> 16) | 0x40, rounded).astype(np.uint16)


def bf16_values(bits: np.ndarray) -> np.ndarray:
    """float32 from the uint16 of bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _e4m3_table() -> np.ndarray:
    codes = np.arange(128)
    exponent, fraction = codes >> 3, codes & 7
    values = np.where(exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent - 10.0))
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


# The value of every e4m3 code.
E4M3 = _e4m3_table()
_POSITIVE = E4M3[:127].astype(np.float64)
_HALFWAY = (_POSITIVE[1:] + _POSITIVE[:-1]) / 2
_MAGNITUDE = np.abs(E4M3).astype(np.float64)


def e4m3_codes(values: np.ndarray) -> np.ndarray:
    """uint8 codes nearest to finite values of at most 448, ties to the even code."""
    absolute = np.abs(values)
    below, above = np.searchsorted(_HALFWAY, absolute, "left"), np.searchsorted(_HALFWAY, absolute, "right")
    codes = np.where(below % 2 == 0, below, above)
    return (codes | (np.signbit(values) * 128)).astype(np.uint8)


def e8m0_values(codes: np.ndarray) -> np.ndarray:
    """float32 2^(code - 127); 255 is NaN."""
    return np.where(codes == 255, np.nan, np.ldexp(1.0, codes.astype(np.int64) - 127)).astype(np.float32)


def _finite(rows_NW: np.ndarray, name: str) -> None:
    if not np.isfinite(rows_NW).all():
        raise ConfigError(f"{name} holds finite numbers; got {rows_NW[~np.isfinite(rows_NW)][0]}.")


def _representable(rows_NW: np.ndarray, decoded_NW: np.ndarray, name: str) -> None:
    """Rounding up must not leave float32: the number would come back infinite."""
    lost = decoded_NW > _FLOAT_MAX
    if lost.any():
        raise ConfigError(
            f"{name} would round {rows_NW[lost][0]:g} to {decoded_NW[lost][0]:g}, beyond float32."
        )
