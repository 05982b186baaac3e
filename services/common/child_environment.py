"""Environment variables of child processes: only those listed here, and no secrets.

A process that runs a model, a template or a compiler does not need the passwords, keys and addresses of its parent, and
an attacker who breaks into it must not find them there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import translate

SERVICE_LOG = "SCALELLM_SERVICE_LOG"
"""Variable that `scalellm up` sets for a service and all its children, by which `scalellm down` recognises them."""

KEEP = "SCALELLM_KEEP_ENVIRONMENT"
"""Variable with further names (or patterns such as `ACME_*`), separated by commas, that an operator wants to pass
on."""

EXPORT = "OTEL_*"
"""Variables for the export of traces, which may contain a collector's keys. Only for processes that export traces."""

_ALLOWED = (
    # Paths and locale.
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "PWD", "TMPDIR", "LANG", "LANGUAGE", "LC_*", "TZ", "TZDIR", "TERM"),
    *("NO_COLOR", "XDG_*", "SSL_CERT_*"),
    # The interpreter, the loader and the allocator.
    *("PYTHON*", "VIRTUAL_ENV", "LD_*", "DYLD_*", "GLIBC_TUNABLES", "MALLOC_*", "MIMALLOC_*", "TCMALLOC_*"),
    "*SAN_OPTIONS",
    # Libraries that compute on a CPU.
    *("OMP_*", "GOMP_*", "KMP_*", "MKL_*", "OPENBLAS_*", "BLIS_*", "NUMEXPR_*", "ONEDNN_*", "DNNL_*", "ATEN_*"),
    # Devices and the compilers for them.
    *("CUDA*", "CUBLAS_*", "CUDNN_*", "NVIDIA_*", "NCCL_*", "GLOO_*", "TORCH*", "PYTORCH_*", "TRITON_*", "PTXAS*"),
    *("HIP_*", "HSA_*", "ROC*", "AMD_*", "MIOPEN_*", "GPU_*", "ZE_*", "SYCL_*"),
    *("CC", "CXX", "CPATH", "*_INCLUDE_PATH", "LIBRARY_PATH", "GCC_*", "COMPILER_PATH", "CCACHE_*"),
    # Other libraries of ours.
    *("GRPC_*", "TOKENIZERS_*", "HF_*", "PROMETHEUS_*", "COVERAGE_*", "COV_*", "PYTEST_*"),
    *(SERVICE_LOG, KEEP),
)
_SECRET = re.compile("TOKEN(?!IZER)|SECRET|PASSW|CREDENTIAL|(API|ACCESS|PRIVATE)_?KEY", re.IGNORECASE)


def child_environment(environment: Mapping[str, str], *more: str) -> dict[str, str]:
    """Return the part of `environment` for a child.

    Args:
        environment: This process's environment.
        more: Names or patterns of additional variables for this child, which may be secrets.
    """
    kept = [name for name in environment.get(KEEP, "").replace(" ", "").split(",") if name]
    allowed, named = _matcher(_ALLOWED), _matcher((*more, *kept))
    return {
        name: value
        for name, value in environment.items()
        if named.fullmatch(name) or (allowed.fullmatch(name) and not _SECRET.search(name))
    }


def _matcher(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(translate, patterns)) or r"(?!)")
