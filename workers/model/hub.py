"""Models on the Hugging Face hub: which revision is meant, and its files."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvmesh.workers.errors import ConfigError

logger = logging.getLogger(__name__)

_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([A-Za-z0-9][\w./-]*))?")
# Copies of the weights for other programs. Here a * also matches /.
_UNREAD_FILES = ("*/*.safetensors", "consolidated*.safetensors")


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model as users name it: owner/name, or owner/name@revision.

    repo: owner/name
    revision: a branch, a tag or a commit; None for the default branch
    """

    repo: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubModel | None:
        """None if the text does not name a model on the hub."""
        found = _NAME.fullmatch(text)
        return cls(found[1], found[2]) if found else None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"

    def cached(self, file: str) -> Path | None:
        """Where a file of it is, if it was downloaded before."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo, file, revision=self.revision)
        return Path(found) if isinstance(found, str) else None

    def download(self, patterns: Sequence[str]) -> Path:
        """The directory with its files that match the patterns. Raises ConfigError."""
        import httpx2
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            directory = snapshot_download(
                self.repo,
                revision=self.revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(_UNREAD_FILES),
            )
        except LocalEntryNotFoundError as error:
            raise ConfigError(
                "model",
                f"{self} is not on this machine and the hub cannot be reached;"
                " download the model or check the network",
            ) from error
        except (HfHubHTTPError, HFValidationError) as error:
            reason = f"{self} cannot be downloaded from the hub: {error}"
            raise ConfigError("model", reason) from error
        # The connection or the disk; hf_xet raises RuntimeError for both.
        except (httpx2.HTTPError, OSError, RuntimeError) as error:
            raise ConfigError(
                "model",
                f"{self} was not downloaded completely: {str(error) or repr(error)}; the files that"
                " are complete are kept, so start again to continue",
            ) from error
        return Path(directory)


def pinned(model: str) -> str:
    """The model's name with the commit that it means now, if it is one on the hub.

    Processes that start at different times, or again, so have the same weights, whatever is
    pushed meanwhile. A directory or a file is what it is. If neither the hub nor this machine's
    cache knows the commit, the name stays as it is: those that load the model may know more.
    """
    named = None if Path(model).expanduser().exists() else HubModel.parse(model)
    if named is None:
        return model
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RevisionResolutionError

    try:
        commit = HfApi().resolve_revision(named.repo, revision=named.revision).resolved
    except (RevisionResolutionError, HFValidationError, httpx2.HTTPError, OSError) as error:
        logger.warning("the commit of %s is not known, so it is not pinned: %s", model, error)
        return model
    return f"{named.repo}@{commit}"
