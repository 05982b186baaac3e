"""Environment of a child process."""

from pathlib import Path

import pytest

from scalellm.launcher import UpOptions
from scalellm.launcher.plan import service_environment
from scalellm.services.common.child_environment import child_environment

SECRETS = {
    "REDIS_URL": "redis://:hunter2@host",
    "AWS_SECRET_ACCESS_KEY": "a",
    "AWS_PROFILE": "prod",
    "HF_TOKEN": "a",
    "HUGGING_FACE_HUB_TOKEN": "a",
    "GITHUB_TOKEN": "a",
    "SCALELLM_API_KEY": "slm-a",
    "SCALELLM_TOKENIZER_SALT_SECRET": "a",
    "SCALELLM_TOKENIZER_API_KEYS": "/keys.toml",
    "SCALELLM_EXECUTOR_LINK_TOKEN_FILE": "/token",
    "PGPASSWORD": "a",
    "HTTPS_PROXY": "http://user:hunter2@proxy",
    "PIP_INDEX_URL": "https://user:hunter2@index",
    "NVIDIA_API_KEY": "a",
    "PYTHON_KEYRING_PASSWORD": "a",
    "DATABASE": "postgres://u:p@h",
    "SSH_AUTH_SOCK": "/agent",
}
NEEDED = (
    *(
        "PATH",
        "HOME",
        "LANG",
        "LC_ALL",
        "TZ",
        "TMPDIR",
        "PYTHONPATH",
        "LD_LIBRARY_PATH",
        "LD_PRELOAD",
        "OMP_NUM_THREADS",
    ),
    *(
        "GOMP_SPINCOUNT",
        "KMP_AFFINITY",
        "MKL_NUM_THREADS",
        "CUDA_VISIBLE_DEVICES",
        "CUDA_HOME",
        "CUDACXX",
        "NCCL_DEBUG",
    ),
    *("NVIDIA_VISIBLE_DEVICES", "TRITON_CACHE_DIR", "TORCH_LOGS", "TORCHINDUCTOR_CACHE_DIR", "PYTORCH_CUDA_ALLOC_CONF"),
    *(
        "ROCR_VISIBLE_DEVICES",
        "HIP_VISIBLE_DEVICES",
        "HF_HOME",
        "CC",
        "CXX",
        "XDG_CACHE_HOME",
        "TOKENIZERS_PARALLELISM",
    ),
    *("GRPC_VERBOSITY", "SCALELLM_SERVICE_LOG"),
)


def test_what_programs_read_is_kept_and_secrets_are_not() -> None:
    needed = dict.fromkeys(NEEDED, "1")
    assert child_environment({**needed, **SECRETS}) == needed


@pytest.mark.parametrize("kept", ["ACME_*, HF_TOKEN", "HF_TOKEN,,ACME_HOME"])
def test_operators_can_keep_more(kept: str) -> None:
    environment = {**SECRETS, "ACME_HOME": "/acme", "SCALELLM_KEEP_ENVIRONMENT": kept}
    assert child_environment(environment) == {
        "ACME_HOME": "/acme",
        "HF_TOKEN": "a",
        "SCALELLM_KEEP_ENVIRONMENT": kept,
    }


def test_a_service_has_its_own_settings() -> None:
    options = UpOptions({"m": Path()}, Path(), {**SECRETS, "OTEL_EXPORTER_OTLP_HEADERS": "api-key=a"})
    assert set(service_environment(options, "tokenizer", "redis://")) == {
        "SCALELLM_TOKENIZER_SALT_SECRET",
        "SCALELLM_TOKENIZER_API_KEYS",
        "SCALELLM_TOKENIZER_REDIS_URL",
        "SCALELLM_TOKENIZER_LOG_FORMAT",
        "OTEL_EXPORTER_OTLP_HEADERS",
    }
    executor = service_environment(options, "executor", "redis://")
    assert set(executor) == {
        "SCALELLM_EXECUTOR_LINK_TOKEN_FILE",
        "SCALELLM_EXECUTOR_LOG_FORMAT",
        "OTEL_EXPORTER_OTLP_HEADERS",
    }
    assert not child_environment(executor), "the engine exports nothing"
