"""Policy server and client over gRPC: images in, action chunks in the robot's units out.

gRPC carries the messages; a message is a safetensors file in memory, which can hold numbers and text but
no code. The client needs neither torch nor the policy's libraries.

=============================  ==========================================================================
``/wmpo.v1.Policy/Describe``   empty request; answers JSON: task, instructions, chunk, limits, rate
``/wmpo.v1.Policy/Act``        ``pixels`` uint8 (H, W, 3) of any size, and the text ``instruction`` in the
                               header's ``__metadata__``; answers ``actions`` float32 (K, D)
=============================  ==========================================================================
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from wmpo_gym.data.images import resize_area
from wmpo_gym.data.statistics import from_unit
from wmpo_gym.tasks import Task

if TYPE_CHECKING:
    from wmpo_gym.policies.base import GroupPolicy

SERVICE, PROTOCOL = "wmpo.v1.Policy", 1
DEFAULT_ADDRESS = "127.0.0.1:8765"
MAX_MESSAGE = 1 << 23  # bytes; an image of 1600 x 1600
MAX_WAITING = 8  # requests; more are refused at once, because a late action is useless


def pack(tensors: dict[str, np.ndarray], **texts: str) -> bytes:
    """A message of arrays and texts."""
    from safetensors.numpy import save

    return save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, texts or None)


def unpack(message: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and texts of a message.

    Raises:
        ValueError: If it is not such a message.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(message)
        header = json.loads(message[8 : 8 + int.from_bytes(message[:8], "little")])
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"not a safetensors message ({error})") from error
    return tensors, header.get("__metadata__") or {}


def is_loopback(address: str) -> bool:
    """Whether only programs on this machine can reach an address such as ``127.0.0.1:8765``."""
    host = address.rpartition(":")[0].strip("[]")
    if address.startswith("unix:") or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _grpc() -> Any:
    try:
        import grpc
    except ImportError as error:
        raise ImportError("A policy server needs grpcio: pip install 'wmpo-gym[serve]'") from error
    return grpc


class PolicyServer:
    """Answers observations with action chunks; a context manager that serves while it is open.

    Requests are answered one after the other. There is neither encryption nor a password: keep it on the
    loopback interface, or behind a tunnel.

    Args:
        policy: The policy.
        task: Its task: instructions, rate and the limits of the actions.
        address: ``host:port`` (port 0 takes a free one) or ``unix:/path``.
        deterministic: Greedy actions.

    Raises:
        ValueError: If policy and task do not belong together.
        OSError: If the address cannot be had.
        ImportError: If grpcio is missing.
    """

    def __init__(
        self,
        policy: GroupPolicy,
        task: Task,
        address: str = DEFAULT_ADDRESS,
        *,
        deterministic: bool = True,
    ) -> None:
        known = tuple(getattr(policy, "instructions", task.instructions))
        if policy.action_space.shape != (task.chunk, task.action_dim) or known != task.instructions:
            raise ValueError(
                f"The policy acts in chunks of shape {policy.action_space.shape} on {known}, task "
                f"{task.name!r} has ({task.chunk}, {task.action_dim}) and {task.instructions}; give the task "
                "it was trained for."
            )
        self.policy, self.task, self.deterministic = policy, task, deterministic
        self.image_size = int(policy.observation_space["pixels"].shape[1])
        grpc = _grpc()
        self._server = grpc.server(
            ThreadPoolExecutor(1),
            handlers=[self._handlers(grpc)],
            options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", MAX_MESSAGE)],
            maximum_concurrent_rpcs=MAX_WAITING,
        )
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            port, reason = 0, str(error)
        else:
            reason = ""
        if not port:
            raise OSError(
                f"Cannot listen on {address}: it is in use or not an address here. {reason}".strip()
            )
        self.address = address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"

    def _handlers(self, grpc: Any) -> Any:
        def answering(method: Callable[[bytes], bytes]) -> Any:
            def handle(request: bytes, context: Any) -> bytes:
                try:
                    return method(request)
                except ValueError as error:
                    return context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

            return grpc.unary_unary_rpc_method_handler(handle)

        methods = {"Describe": answering(self._describe), "Act": answering(self._act)}
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def _describe(self, request: bytes) -> bytes:
        task = self.task
        described = {
            "protocol": PROTOCOL,
            "task": task.name,
            "instructions": list(self.task.instructions),
            "chunk": task.chunk,
            "action_dim": task.action_dim,
            "action_low": list(task.action_low),
            "action_high": list(task.action_high),
            "control_hz": task.control_hz,
            "image_size": self.image_size,
            "deterministic": self.deterministic,
        }
        return json.dumps(described).encode()

    def _act(self, request: bytes) -> bytes:
        import torch

        tensors, texts = unpack(request)
        pixels = tensors.get("pixels")
        if pixels is None or pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
            found = "missing" if pixels is None else f"{pixels.dtype} {pixels.shape}"
            raise ValueError(f"pixels must be one image uint8 (H, W, 3), got {found}")
        if 0 in pixels.shape:
            raise ValueError("the image is empty")
        instruction = texts.get(
            "instruction", self.task.instructions[0] if len(self.task.instructions) == 1 else None
        )
        if instruction not in self.task.instructions:
            raise ValueError(f"instruction {instruction!r} is none of {list(self.task.instructions)}")
        image = resize_area(pixels, self.image_size, self.image_size)
        observation = {
            "pixels": torch.from_numpy(image[None]),
            "task_id": torch.tensor([self.task.instructions.index(instruction)]),
        }
        chunk = self.policy.sample(observation, self.deterministic)[0][0].cpu().numpy()
        return pack({"actions": from_unit(chunk.clip(-1, 1), self.task.action_low, self.task.action_high)})

    def __enter__(self) -> PolicyServer:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait(self) -> None:
        """Serve until :meth:`stop`."""
        self._server.wait_for_termination()

    def stop(self) -> None:
        """Finish the request at hand and stop."""
        self._server.stop(grace=5.0).wait()


class PolicyClient:
    """Asks a policy server for actions; a context manager.

    Args:
        address: Where it listens.
        timeout: Seconds to wait for an answer.

    Raises:
        ImportError: If grpcio is missing.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, timeout: float = 10.0) -> None:
        self._grpc, self.address, self.timeout = _grpc(), address, timeout
        options = [("grpc.enable_http_proxy", 0), ("grpc.max_send_message_length", MAX_MESSAGE)]
        self._channel = self._grpc.insecure_channel(address, options)

    def describe(self) -> dict[str, Any]:
        """Task, instructions, chunk, limits of the actions and control rate.

        Raises:
            ConnectionError: If there is no answer.
        """
        return json.loads(self._call("Describe", b""))

    def act(self, pixels: np.ndarray, instruction: str | None = None) -> np.ndarray:
        """The next actions, to be executed at the task's control rate.

        Args:
            pixels: What the robot sees, uint8 (H, W, 3); squashed to the policy's size as on import.
            instruction: One of the task's sentences; may be left out if there is only one.

        Returns:
            float32 (K, D) in the robot's units.

        Raises:
            ValueError: If the server refuses the observation; the message says why.
            ConnectionError: If there is no answer.
        """
        texts = {} if instruction is None else {"instruction": instruction}
        return unpack(self._call("Act", pack({"pixels": pixels}, **texts)))[0]["actions"]

    def _call(self, method: str, message: bytes) -> bytes:
        call = self._channel.unary_unary(f"/{SERVICE}/{method}")
        try:
            return call(message, timeout=self.timeout)
        except self._grpc.RpcError as error:
            if error.code() == self._grpc.StatusCode.INVALID_ARGUMENT:
                raise ValueError(f"The policy server refused the observation: {error.details()}") from None
            raise ConnectionError(
                f"No answer from a policy server at {self.address} ({error.code().name}: {error.details()}); "
                "`wmpo serve` starts one."
            ) from None

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()
