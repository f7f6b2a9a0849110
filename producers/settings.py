"""Settings of the publisher."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class PublisherSettings(BaseModel):
    """How frames are encoded and how much may wait in a product's stream."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    codec: Literal["jpeg", "png", "raw"] = "jpeg"
    jpeg_quality: int = Field(default=95, ge=1, le=100)
    policy: Literal["block"] = "block"
    max_in_flight: int = Field(default=256, ge=1, description="frames of one product waiting for their verdict")
    retry_s: float = Field(default=10.0, ge=0, description="how long a lost server is waited for")
