"""Named attention shapes, for tests and benchmarks: one sample of each real run, and small ones for a CPU."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Workload:
    """q is [batch, q_len, heads, head_dim]; k and v are [batch, k_len, heads, head_dim]."""

    name: str
    batch: int
    q_len: int
    k_len: int
    heads: int
    head_dim: int

    @property
    def cross(self):
        """Whether keys and values come from elsewhere (the text), and so carry no tangent in a jvp."""
        return self.q_len != self.k_len


TEXT_TOKENS = 512  # what both families pad their prompts to

_SELF = (
    # Wan: 832×480, 77 frames (1.3B) and 81 (14B). Cosmos: 1360×768, one frame.
    Workload("wan_1.3b", 1, 31_200, 31_200, 12, 128),
    Workload("wan_14b", 1, 32_760, 32_760, 40, 128),
    Workload("cosmos_0.6b", 1, 4_080, 4_080, 20, 64),
    Workload("cosmos_2b", 1, 4_080, 4_080, 16, 128),
    Workload("cosmos_14b", 1, 4_080, 4_080, 40, 128),
    Workload("cpu_2048", 1, 2_048, 2_048, 1, 64),
    Workload("cpu_8192", 1, 8_192, 8_192, 1, 64),
)

WORKLOADS = {w.name: w for w in (*_SELF, *(replace(w, name=f"{w.name}_cross", k_len=TEXT_TOKENS) for w in _SELF))}
REAL = tuple(name for name in WORKLOADS if not name.startswith("cpu"))
