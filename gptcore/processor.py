"""Rules by processor: the precision of training, and the library that multiplies a few rows with a matrix.

Rules are fixed: nothing is timed at run time, so two runs on equal processors choose the same. `python -m
bench.processor` measures the choices on any machine and says where a rule would choose otherwise. A processor that
nobody has measured keeps the rule of the Intel Xeon with AVX-512. torch is imported on the first question only.
"""

from functools import cache
from typing import Any, Literal, NamedTuple


class Processor(NamedTuple):
    """The properties of a processor that decide."""

    is_amd: bool
    has_avx512: bool
    has_avx512_bf16: bool = False


@cache
def find_processor() -> Processor:
    """Return what this machine's processor is."""
    import torch

    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.9 does not know
    return Processor(
        is_amd=str(found.get("cpu_name", "")).upper().startswith("AMD"),
        has_avx512=bool(found.get("avx512_f")),
        has_avx512_bf16=bool(found.get("avx512_bf16")),
    )


def choose_precision() -> Literal["fp32", "bf16"]:
    """Return the precision in which this processor trains faster.

    - AMD EPYC with avx512_bf16 (2 cores): a step at GPT-2's 124M takes 2373 ms in fp32 and 1356 in bf16, 598 and 435 at
      shape S, 1318 and 810 at shape C. The losses after seven steps are equal to 0.03 percent.
    - Intel Xeon with avx512_bf16, without AMX: bf16 takes 1.6 times as long as fp32.
    - AMD EPYC with AVX2: bf16 takes hundreds of times as long.
    """
    processor = find_processor()
    return "bf16" if processor.is_amd and processor.has_avx512_bf16 else "fp32"


def choose_min_rows(weights: int) -> int | None:
    """Return how many rows oneDNN multiplies faster than MKL with a matrix of so many numbers. None: MKL is faster.

    - Intel Xeon with AVX-512: at 8 rows by GPT-2's matrices oneDNN takes 0.5 to 0.8 times as long, at 32 equally long.
      With fewer rows, or matrices that a core's cache holds, MKL is up to 2 times as fast.
    - AMD EPYC with AVX2 (2 cores), in microseconds by MKL and by oneDNN: 1 row by 3072 x 768: 277 and 322, by 50257 x
      384: 9313 and 6312, by 50257 x 768: 13294 and 8680. 2 rows by 768 x 768: 120 and 123, by 3072 x 768: 879 and 431.
      4 rows by 1536 x 384: 197 and 160, by 384 x 384: 62 and 73.
    - AMD EPYC with AVX-512, the same: 1 row by 3072 x 768: 166 and 78, by 50257 x 768: 11400 and 6100. MKL is faster by
      384 x 384.
    """
    processor = find_processor()
    if not processor.is_amd:
        sizes = {4: 2**20}
    elif processor.has_avx512:
        sizes = {1: 2**21, 4: 2**19}
    else:
        sizes = {1: 2**23, 2: 2**21, 4: 2**19}
    return next((rows for rows, least in sizes.items() if weights >= least), None)
