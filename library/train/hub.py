"""Files to the Hugging Face hub while a run goes on, and a state from there to go on with.

A thread of its own sends what was saved, so that nothing the hub does stops or delays the training. What is to be sent
is held by hard links, because files on the way are removed or replaced. Nothing here imports torch.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.options import OptionError
from library.train.callbacks import Callback
from library.train.output_options import HubOptions
from library.train.resume import STATE_FILE

logger = logging.getLogger(__name__)

REPO_FLAG = "--huggingface_repo_id"
TIMEOUTS = (30, 300, 300, 30)  # seconds: connect, read, write, wait for a free connection
PAUSES = (5, 30)  # seconds before an upload is tried a second and a third time
PATIENCE_WHEN_STOPPED = 30  # seconds that a run which was asked to stop, or whose hub is down, waits for its uploads
PATIENCE = 1800  # seconds that any run waits for them at its end
STAGING = ".upload-"  # how the folders of hard links begin
LONGEST_REASON = 200  # letters of an error that are shown
WORTH_ANOTHER_TRY = (408, 409, 412, 429)  # HTTP errors that pass; so do all from 500 on


@dataclass(frozen=True)
class _Upload:
    source: Path  # a file or a folder
    staging: Path | None  # folder of hard links to remove afterwards
    name: str


class HubUploader(Callback):
    """Sends every saved file, and states if asked, to a repository; says once when that fails."""

    def __init__(self, options: HubOptions, name: str, is_stopping: Callable[[], bool]) -> None:
        """`name` is that of the run's files; it keeps the hard links of runs in the same folder apart."""
        self.options, self.name, self.is_stopping = options, name, is_stopping
        self._queue: queue.Queue[_Upload] = queue.Queue()
        self._pending: list[str] = []  # names of what is not yet sent or given up
        self._thread: threading.Thread | None = None
        self._has_repo = False
        self._is_hopeless = False
        self._is_down = False  # all tries of an upload have failed, and none has worked since
        self._gives_up = threading.Event()  # set when the program waits no longer
        self._missing: list[str] = []

    def on_saved(self, path: Path) -> None:
        is_state = (path / STATE_FILE).is_file()  # else, where it is a folder, a model in the Diffusers form
        if is_state and not self.options.save_state_to_huggingface:
            return
        self._pending.append(path.name)
        self._queue.put(_staged(path, self.name))
        if self._thread is None:
            self._thread = threading.Thread(target=self._send_all, name="hub uploads", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Wait for what is still to be sent; a request to stop, and a hub that is down, shorten the wait."""
        deadline, is_short = time.monotonic() + PATIENCE, False
        if self._pending and not self._is_hopeless:
            logger.info("waiting for %d uploads to %s", len(self._pending), self.options.huggingface_repo_id)
        while self._pending:
            if not is_short and (self._is_down or self.is_stopping()):
                deadline, is_short = min(deadline, time.monotonic() + PATIENCE_WHEN_STOPPED), True
            if time.monotonic() > deadline:
                self._gives_up.set()
                self._missing += self._pending
                break
            time.sleep(0.05)
        missing, self._missing = self._missing, []
        if missing:
            logger.warning("not uploaded to %s: %s", self.options.huggingface_repo_id, ", ".join(missing))

    # ------------------------------------------------------------------------------------------ in the thread

    def _send_all(self) -> None:
        while True:
            upload = self._queue.get()
            try:
                self._send_or_say(upload)
            finally:
                if upload.staging is not None:
                    shutil.rmtree(upload.staging, ignore_errors=True)
                self._pending.remove(upload.name)

    def _send_or_say(self, upload: _Upload) -> None:
        error: Exception | None = None
        for pause in (0.0,) if self._is_down else (0.0, *PAUSES):
            if self._is_hopeless or self._gives_up.wait(pause):
                break
            try:
                self._send(upload)
                self._is_down = False
                logger.info("%s is uploaded", upload.name)
                return
            except Exception as problem:  # whatever it is, the training matters more
                error = problem
                if not _may_pass(problem):
                    self._is_hopeless = True
        self._is_down |= error is not None
        if error is not None and not self._missing:
            reason = _reason(error, self.options.huggingface_token)
            logger.warning("%s was not uploaded, training goes on: %s", upload.name, reason)
        self._missing.append(upload.name)

    def _send(self, upload: _Upload) -> None:
        from huggingface_hub import HfApi

        options = self.options
        _limit_waiting()
        api = HfApi(token=options.huggingface_token)
        repo: dict[str, Any] = {"repo_id": options.huggingface_repo_id, "repo_type": options.huggingface_repo_type}
        if not self._has_repo:
            sdk = "static" if options.huggingface_repo_type == "space" else None
            api.create_repo(**repo, space_sdk=sdk, private=options.is_private, exist_ok=True)
            self._has_repo = True
        target = options.path_of(upload.name)
        message = f"Upload {upload.name}"
        if upload.source.is_dir():
            api.upload_folder(**repo, folder_path=upload.source, path_in_repo=target, commit_message=message)
        else:
            api.upload_file(**repo, path_or_fileobj=upload.source, path_in_repo=target, commit_message=message)


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove the hard links that an earlier run of this name left in `folder` when it was killed."""
    for staging in folder.glob(f"{STAGING}*"):
        if re.fullmatch(re.escape(f"{STAGING}{name}-") + r"\w+", staging.name):
            shutil.rmtree(staging, ignore_errors=True)


def _staged(path: Path, name: str) -> _Upload:
    """The file or folder as it is now, whatever becomes of it; as it is later, where the disk knows no hard links."""
    staging = None
    try:
        staging = Path(tempfile.mkdtemp(prefix=f"{STAGING}{name}-", dir=path.parent))
        if path.is_dir():
            shutil.copytree(path, staging / path.name, copy_function=os.link)
        else:
            os.link(path, staging / path.name)
        return _Upload(staging / path.name, staging, path.name)
    except OSError:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        return _Upload(path, None, path.name)


def _reason(error: Exception, token: str | None) -> str:
    """An error in one line, without the token."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    text = " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__
    text = f"HTTP {status}, {text}" if status else text
    return text.replace(token, "***") if token else text


def _may_pass(error: Exception) -> bool:
    """Whether the same may work in a while: not so for a wrong name or token."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None:
        from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

        return not isinstance(error, (HFValidationError, OfflineModeIsEnabled))
    return status >= 500 or status in WORTH_ANOTHER_TRY


def _limit_waiting() -> None:
    """The hub's library waits for an answer without end unless told otherwise."""
    from huggingface_hub.utils import get_session

    get_session().timeout = TIMEOUTS


# ---------------------------------------------------------------------------------------------- before the start


def check_hub(options: HubOptions) -> list[str]:
    """Raise OptionError for a repository that can't exist; returns sentences on what will fail later."""
    if not options.huggingface_repo_id:
        return []
    _check_repo_id(options.huggingface_repo_id, REPO_FLAG)
    from huggingface_hub import get_token

    if not (options.huggingface_token or get_token()):
        way_out = "set HF_TOKEN or log in with `hf auth login`"
        return [f"{REPO_FLAG}: no access token is known, so nothing will be uploaded; {way_out}"]
    return []


def fetch_state(resume: str, token: str | None) -> Path:
    """The local folder of a state on the hub, "owner/name/folder[:revision[:type]]"; fetched unless it is cached."""
    flag = "--resume"
    place, _, rest = resume.partition(":")
    revision, _, repo_type = rest.partition(":")
    parts = place.strip("/").split("/")
    if len(parts) < 3:
        way_out = "write owner/name/folder, and :revision if need be"
        raise OptionError(flag, f"{resume} names no folder in a repository", way_out)
    repo_id, folder = "/".join(parts[:2]), "/".join(parts[2:])
    _check_repo_id(repo_id, flag)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    logger.info("fetching the state %s", resume)
    _limit_waiting()
    try:
        local = snapshot_download(
            repo_id,
            repo_type=repo_type or None,
            revision=revision or None,
            allow_patterns=[f"{folder}/*"],
            token=token,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        problem = f"{resume} can't be fetched from the hub ({_reason(error, token)})"
        raise OptionError(flag, problem, "check the name") from None
    if not (Path(local) / folder).is_dir():
        raise OptionError(flag, f"the repository {repo_id} has no folder {folder}", "check the name")
    return Path(local) / folder


def _check_repo_id(repo_id: str, flag: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise OptionError(flag, f"{repo_id} is no name of a repository ({error})", "write owner/name") from None
