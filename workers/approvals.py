"""Approvals: a person's word on a frame, kept with the image beside the product's training data."""

from datetime import UTC, datetime
from typing import Literal

import pyarrow.fs as pafs
from pydantic import BaseModel, ValidationError

from producers.frame import check_product
from workers.errors import JobError
from workers.reading import read_results
from workers.results import filesystem

Label = Literal["normal", "defect"]


class Approval(BaseModel):
    """A person's word on a frame.

    Attributes:
        frame_id: the frame.
        label: `normal`, or `defect` for one that was missed.
        by: who said so.
        at: when (UTC).
        verdict: what Proctor had said.
        score: its score then.
        model_version: the version that said it.
        image: path of the image below the datasets' root.
    """

    frame_id: str
    label: Label
    by: str
    at: datetime
    verdict: str
    score: float | None
    model_version: str | None
    image: str


class Approvals:
    """Keeps approved images and who approved them as `{root}/{product}/approved/{camera}-{seq}.jpg` and `.json`.

    Args:
        datasets_uri: a folder or pyarrow.fs URI.
        results_uri: where the frames' images are.
    """

    def __init__(self, datasets_uri: str, results_uri: str) -> None:
        self._fs, self._root = filesystem(datasets_uri)
        self._results_uri = results_uri

    def approve(self, frame_ids: list[str], label: Label, by: str) -> list[Approval]:
        """Record a person's word on frames. All are checked before the first is recorded.

        Raises:
            JobError: a frame has no result, or its image was not kept.
        """
        columns = ("frame_id", "product", "camera", "seq", "verdict", "score", "model_version", "image_jpeg")
        rows = read_results(self._results_uri, frame_ids=frame_ids, columns=columns).to_pylist()
        found = {row["frame_id"]: row for row in rows}
        for frame_id in frame_ids:
            if frame_id not in found:
                raise JobError(f"no result for frame {frame_id}; `proctor results` lists them")
            if found[frame_id]["image_jpeg"] is None:
                raise JobError(
                    f"no image was kept of frame {frame_id}: passes are kept as [worker.evidence] says, "
                    "fails always are, all of them as long as [results] evidence_days says"
                )
        return [self._record(found[frame_id], label, by) for frame_id in dict.fromkeys(frame_ids)]

    def _record(self, row: dict, label: Label, by: str) -> Approval:
        folder = f"{row['product']}/approved"
        name = f"{folder}/{row['camera']}-{row['seq']}"
        approval = Approval(
            frame_id=row["frame_id"],
            label=label,
            by=by,
            at=datetime.now(UTC),
            verdict=row["verdict"],
            score=row["score"],
            model_version=row["model_version"],
            image=f"{name}.jpg",
        )
        try:
            self._fs.create_dir(f"{self._root}/{folder}", recursive=True)
            self._write(approval.image, row["image_jpeg"])
            self._write(f"{name}.json", approval.model_dump_json(indent=2).encode())  # last: it makes it count
        except OSError as error:
            raise JobError(f"cannot record the approval of {approval.frame_id}: {error}") from None
        return approval

    def _write(self, path: str, content: bytes) -> None:
        final = f"{self._root}/{path}"
        with self._fs.open_output_stream(f"{final}.tmp") as sink:
            sink.write(content)
        self._fs.move(f"{final}.tmp", final)

    def of(self, product: str, label: Label = "normal") -> list[Approval]:
        """A product's approvals with this label, by camera and sequence number."""
        selector = pafs.FileSelector(f"{self._root}/{check_product(product)}/approved", allow_not_found=True)
        approvals = []
        for info in sorted(self._fs.get_file_info(selector), key=lambda info: info.base_name):
            if not info.base_name.endswith(".json"):
                continue
            with self._fs.open_input_stream(info.path) as source:
                content = source.read()
            try:
                approvals.append(Approval.model_validate_json(content))
            except ValidationError:
                raise JobError(f"the approval {info.path} is not readable; delete it or restore it") from None
        return [approval for approval in approvals if approval.label == label]

    def image(self, approval: Approval) -> bytes:
        """The approved image's JPEG bytes."""
        try:
            with self._fs.open_input_stream(f"{self._root}/{approval.image}") as source:
                return source.read()
        except OSError as error:
            raise JobError(f"the image of approval {approval.frame_id} is not readable: {error}") from None
