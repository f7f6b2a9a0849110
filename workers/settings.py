"""Settings of the workers."""

from pydantic import BaseModel, ConfigDict, Field

from models.settings import DeviceName


class EvidenceSettings(BaseModel):
    """For which frames map and image are kept with the result; for `fail` and `unknown` they always are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    near: float = Field(default=0.1, ge=0, description="passes within this share below the threshold")
    pass_share: float = Field(default=0.02, ge=0, le=1, description="sampled share of the other passes")


class WorkerSettings(BaseModel):
    """Batching, recovery, results and health of one replica."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: DeviceName = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    max_batch: int = Field(default=16, ge=1)
    compile: bool = Field(default=True, description="networks are compiled in the background: faster after a minute")
    gpu_memory_mb: int = Field(default=4096, ge=64, description="of a GPU, for students of products")
    batch_wait_ms: float = Field(default=4.0, ge=0, description="longest wait of a frame for company")
    decode_threads: int = Field(default=2, ge=1)
    gpu_decode: bool = Field(default=False, description="the GPU decodes JPEGs, where the engine is on one")
    max_megapixels: float = Field(default=64.0, gt=0, le=178, description="178 is the decoder's own limit")
    max_deliveries: int = Field(default=3, ge=1, description="an entry delivered more often is dead-lettered")
    claim_idle_ms: int = Field(default=10_000, ge=100, description="an entry idle for longer is taken over")
    takt_ms: float | None = Field(default=None, gt=0, description="a frame's verdict is due so long after its capture")
    takt_margin_ms: float = Field(
        default=10.0,
        ge=0,
        description="a late frame is answered so long before it is due, a quarter of its takt at most",
    )
    consumer_idle_ms: int = Field(
        default=3_600_000, ge=1000, description="a consumer that holds nothing and is silent for longer is removed"
    )
    dead_kept: int = Field(default=1000, ge=1, description="length of a product's dead-letter stream")
    dead_mb: float = Field(default=64.0, gt=0, description="memory of a product's dead-letter stream")
    segment_rows: int = Field(default=256, ge=1)
    segment_ms: float = Field(default=200.0, ge=0, description="longest wait of a row for its segment")
    heartbeat_timeout_s: float = Field(default=20.0, gt=0, description="a loop silent for longer is replaced")
    pointer_poll_s: float = Field(default=0.5, gt=0, description="how often new versions are looked for")
    evidence: EvidenceSettings = EvidenceSettings()

    def takt_of(self, product: str) -> float | None:
        """Return within how many milliseconds of its capture a frame is due, None for no limit."""
        return self.takt_ms

    def shortest_takt_ms(self) -> float | None:
        """Return the shortest of all products' takts, None if no frame is ever due."""
        return self.takt_ms

    def margin_of(self, takt_ms: float) -> float:
        """Return how many milliseconds before a deadline a late frame is answered."""
        return min(self.takt_margin_ms, takt_ms / 4)


class LineSettings(WorkerSettings):
    """The workers' settings with what products have of their own, as `cluster.config` composes them."""

    takts_ms: dict[str, float]

    def takt_of(self, product: str) -> float | None:
        """See WorkerSettings."""
        return self.takts_ms.get(product, self.takt_ms)

    def shortest_takt_ms(self) -> float | None:
        """See WorkerSettings."""
        return min((takt for takt in (self.takt_ms, *self.takts_ms.values()) if takt is not None), default=None)


class ResultsSettings(BaseModel):
    """Where results are, how often segments go into the table, and how long rows and evidence stay."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uri: str = Field(default="", description="a directory or a URI as s3://bucket/path; empty: inside home")
    compact_every_s: float = Field(default=60.0, ge=1, description="pause between two rounds of the compactor")
    keep_days: int = Field(default=0, ge=0, description="rows captured longer ago are deleted; 0: none")
    evidence_days: int = Field(default=0, ge=0, description="maps and images older than that are deleted; 0: none")
