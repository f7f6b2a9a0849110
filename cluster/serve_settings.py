"""Settings of the replicas: how many, what Ray reserves for each, and when their number follows the load."""

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ServeSettings(BaseModel):
    """Replicas of the inspection loop, what Ray reserves for each, and the bounds of their number.

    Attributes:
        replicas: their number, or that of the start where `min_replicas` or `max_replicas` lets it follow the load.
        target_drain_s: the backlog shall be worked off within this time.
        max_oldest_s: no frame shall be older than this before its verdict; 0: no limit.
        scale_up_delay_s: so long more replicas must be needed before they are started.
        scale_down_delay_s: so long fewer must do before some are stopped.
        scale_down_idle_s: when nothing has waited for so long, all above the least number are stopped.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    replicas: int = Field(default=1, ge=1)
    min_replicas: int | None = Field(default=None, ge=1, description="unset: `replicas`")
    max_replicas: int | None = Field(default=None, ge=1, description="unset: `replicas`")
    target_drain_s: float = Field(default=10.0, gt=0)
    max_oldest_s: float = Field(default=30.0, ge=0)
    scale_up_delay_s: float = Field(default=2.0, ge=0)
    scale_down_delay_s: float = Field(default=60.0, ge=0)
    scale_down_idle_s: float = Field(default=30.0, ge=0)
    num_cpus: float = Field(default=1.0, ge=0)
    num_gpus: float = Field(default=0.0, ge=0)
    threads: int = Field(default=0, ge=0, description="CPU threads of a replica; 0: as many as num_cpus")

    @model_validator(mode="after")
    def _bounds_in_order(self) -> "ServeSettings":
        if self.min_replicas is not None and self.min_replicas > self.most:
            name = "replicas" if self.max_replicas is None else "max_replicas"
            raise ValueError(f"min_replicas = {self.min_replicas} is above {name} = {self.most}: raise max_replicas")
        if self.replicas > self.most:
            raise ValueError(f"replicas = {self.replicas} is above max_replicas = {self.most}: raise max_replicas")
        return self

    @property
    def least(self) -> int:
        """Replicas that always run."""
        return self.replicas if self.min_replicas is None else self.min_replicas

    @property
    def most(self) -> int:
        """Replicas that are never exceeded."""
        return self.replicas if self.max_replicas is None else self.max_replicas

    @property
    def at_start(self) -> int:
        """Replicas that the application starts with."""
        return max(self.replicas, self.least)

    @property
    def follows_load(self) -> bool:
        """Whether the number of replicas changes by itself."""
        return self.least < self.most

    def bounded(self, replicas: int) -> int:
        """The nearest number within the bounds."""
        return max(self.least, min(self.most, replicas))
