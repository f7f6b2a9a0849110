"""Settings of the publisher."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Policy = Literal["block", "drop_newest", "drop_oldest"]


class PublisherSettings(BaseModel):
    """How frames are encoded, how much may wait in a product's stream, and what happens beyond that.

    A bound that is reached makes `block` wait, `drop_newest` give up the frame in hand and `drop_oldest` the oldest
    one that no replica has been given; each one given up is counted as shed with its bound, and answered by `unknown`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    codec: Literal["jpeg", "png", "raw"] = "jpeg"
    jpeg_quality: int = Field(default=95, ge=1, le=100)
    policy: Policy = "block"
    max_in_flight: int = Field(default=256, ge=1, description="frames of one product waiting for their verdict")
    max_in_flight_mb: float = Field(default=512.0, gt=0, description="their data; one frame may be larger alone")
    memory_share: float = Field(
        default=0.8, gt=0, le=1, description="of the server's maxmemory, then it counts as full"
    )
    retry_s: float = Field(default=10.0, ge=0, description="how long a lost server is waited for")
    retain_s: float = Field(default=3.0, ge=0, description="how long a published frame is kept, to send it again")
    retain_mb: float = Field(default=64.0, ge=0, description="data kept so at most")
    spool_mb: float = Field(default=1024.0, ge=0, description="frames on disk while Redis is away; 0: no spool")
    spool_after_s: float = Field(default=0.5, ge=0, description="a lost server is waited for so long, then spooled")
    spool_fsync: Literal["always", "interval"] = Field(
        default="interval",
        description="always: each spooled frame survives a power cut; interval: all but those of the last second",
    )
