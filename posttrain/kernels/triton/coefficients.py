"""The backward on a GPU: every tile of logits becomes a tile of dz in one pass."""

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.kernels.accumulation import State
from posttrain.kernels.coefficients import Coefficients
from posttrain.kernels.collectors import local_picks
from posttrain.kernels.triton.blocks import row_blocks
from posttrain.kernels.triton.gradient_rows import Factors, Terms, add_at_ids, gradient_rows

_COEFFICIENTS = Factors._fields[:9]


class TritonTileGradient:
    """Turns the tiles of one block of tokens into tiles of dz, with all terms in one kernel.

    Args:
        result, state, jsd_beta, rows: as for `coefficients.TileGradient`.
        softcap, temperature: of the logits; given a softcap, dz includes its slope (it is then by the capped product).
        out_dtype: None for dz in the place of z; else a new tile of this dtype, as an operand of products.
    """

    def __init__(
        self,
        result: Coefficients,
        state: State,
        jsd_beta: float,
        rows: slice,
        *,
        softcap: float | None = None,
        temperature: float = 1.0,
        out_dtype: torch.dtype | None = None,
    ) -> None:
        self.jsd_beta, self.softcap, self.temperature, self.out_dtype = jsd_beta, softcap, temperature, out_dtype
        found = {name: value[rows] for name in _COEFFICIENTS if (value := getattr(result, name)) is not None}
        scatters = [(ids[rows], values[rows]) for ids, values in result.scatters]
        single = [(ids, values) for ids, values in scatters if ids.shape[1] == 1]
        self.scatters = [(ids, values) for ids, values in scatters if ids.shape[1] > 1]
        self.ids_NS = torch.cat([ids for ids, _ in single], 1) if single else None
        self.values_NS = torch.cat([values for _, values in single], 1) if single else None
        self.terms = Terms(**dict.fromkeys(found, True), singles=len(single), capped=softcap is not None)
        self.reads_teacher = bool({"teacher", "reverse", "mixture"} & found.keys())
        self.reads_student = bool(found.keys() - {"teacher", "constant"}) or softcap is not None
        found |= {name: state[name][rows] for name in Factors._fields[9:] if name in state}
        if "mixture" in found:
            found["log_ratio"] = (state["teacher_total"][rows] / state["total"][rows]).log()
        self.factors = _packed(found, next(iter(state.values()))[rows])

    @property
    def slope(self) -> float:
        """What turns z into the tanh of the softcap."""
        return 0.0 if self.softcap is None else self.temperature / self.softcap

    def __call__(
        self,
        z_NV: Float[Tensor, "rows columns"],
        teacher_z_NV: Float[Tensor, "rows columns"] | None,
        start: int,
    ) -> Float[Tensor, "rows columns"]:
        """dz of the tile that starts at vocabulary entry `start`; z (its values unless needed) may be overwritten."""
        rows, columns = z_NV.shape
        scatters = [(ids_NK, self._sloped(values_NK, ids_NK, z_NV, start)) for ids_NK, values_NK in self.scatters]
        # Values added later want the full digits of what they are added to.
        direct = self.out_dtype is not None and not scatters
        dz_NV = torch.empty((rows, columns), dtype=self.out_dtype, device=z_NV.device) if direct else z_NV
        if rows == 0:
            return dz_NV
        u_NV = z_NV if teacher_z_NV is None else teacher_z_NV
        blocks = row_blocks(columns, steps=4)
        with torch.cuda.device_of(z_NV):
            gradient_rows[-(-rows // blocks.rows),](
                z_NV,
                u_NV,
                dz_NV,
                self.factors,
                self.factors if self.ids_NS is None else self.ids_NS,
                self.factors if self.values_NS is None else self.values_NS,
                rows,
                columns,
                start,
                *z_NV.stride(),
                *u_NV.stride(),
                *dz_NV.stride(),
                self.slope,
                self.jsd_beta,
                terms=self.terms,
                READS=self.reads_student,
                READS_TEACHER=self.reads_teacher,
                ROWS=blocks.rows,
                STEPS=blocks.steps,
                LANES=blocks.lanes,
                num_warps=blocks.warps,
                enable_fp_fusion=True,
            )
            for ids_NK, values_NK in scatters:
                _add_at(dz_NV, ids_NK, values_NK, start)
        return dz_NV if self.out_dtype is None else dz_NV.to(self.out_dtype)

    def _sloped(self, values_NK: Tensor, ids_NK: Tensor, z_NV: Tensor, start: int) -> Tensor:
        """Values for ids of this tile times the slope of the softcap there."""
        if self.softcap is None:
            return values_NK
        local_NK, _ = local_picks(ids_NK, start, z_NV.shape[1])
        return values_NK * (1 - (z_NV.gather(1, local_NK) * self.slope).square())


def _packed(found: dict[str, Tensor], like_N: Tensor) -> Float[Tensor, "slots rows"]:
    """The tokens' numbers in the order of `Factors`."""
    factors = torch.zeros((len(Factors._fields), like_N.shape[0]), dtype=torch.float32, device=like_N.device)
    for name, value_N in found.items():
        factors[Factors._fields.index(name)] = value_N
    return factors


def _add_at(dz_NV: Tensor, ids_NK: Tensor, values_NK: Tensor, start: int) -> None:
    rows, columns = dz_NV.shape
    block = 32
    add_at_ids[-(-rows // block),](
        dz_NV,
        ids_NK,
        values_NK,
        rows,
        columns,
        start,
        *dz_NV.stride(),
        ids_NK.shape[1],
        *ids_NK.stride(),
        *values_NK.stride(),
        ROWS=block,
        num_warps=1,
        enable_fp_fusion=True,
    )
