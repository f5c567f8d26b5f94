"""One hypothesis profile for all tests, the same examples on every run and machine; one thread, as tensors are tiny."""

import torch
from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "longspan",
    derandomize=True,
    deadline=None,
    max_examples=20,
    database=None,
    report_multiple_bugs=False,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("longspan")
torch.set_num_threads(1)
