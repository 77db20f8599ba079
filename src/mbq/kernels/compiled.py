"""CUDA source compiled at run time, kept on disk, and launched: NVRTC and the driver through NVIDIA's Python packages.

No CUDA toolkit is needed: torch's CUDA builds bring NVRTC and cuda-bindings with them. Cubins are kept in
``$MBQ_CACHE`` (~/.cache/mbq/kernels) under a hash of the source, the options, the architecture and NVRTC's version.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch


class CompilationError(Exception):
    """Why a kernel cannot be made here, in a few words."""


def cache_folder() -> Path:
    """Where cubins are kept."""
    return Path(os.environ.get("MBQ_CACHE") or Path.home() / ".cache" / "mbq" / "kernels")


@cache
def bindings() -> tuple[Any, Any]:
    """cuda.bindings' nvrtc and driver modules. Raises CompilationError where they are missing."""
    try:
        from cuda.bindings import driver, nvrtc

        nvrtc.nvrtcVersion()
    except Exception as error:  # an ImportError, or whatever the loader of the shared library raises
        reason = f"NVIDIA's cuda-bindings or NVRTC are not installed ({type(error).__name__})"
        raise CompilationError(reason) from error
    return nvrtc, driver


def _checked(result: tuple[Any, ...], what: str) -> Any:
    """What a call of cuda.bindings returned beside its status. Raises CompilationError where that is no success."""
    if int(result[0]) != 0:
        raise CompilationError(f"{what} failed with {result[0].name}")
    return result[1] if len(result) == 2 else result[1:]


@cache
def read_source(name: str) -> str:
    """The text of a .cu file of this folder, the .cuh file in its place where one is included."""
    folder = resources.files("mbq.kernels")
    text = folder.joinpath(name).read_text()
    return re.sub(r'^#include "(.+)"$', lambda found: folder.joinpath(found[1]).read_text(), text, flags=re.MULTILINE)


def compile_source(source: str, name: str, architecture: int | str, options: Mapping[str, int]) -> bytes:
    """The cubin of ``source`` for sm_``architecture``, with ``options`` as macros. Raises CompilationError."""
    nvrtc, _ = bindings()
    flags = [f"--gpu-architecture=sm_{architecture}", "--std=c++17", *(f"-D{key}={options[key]}" for key in options)]
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], []), "nvrtcCreateProgram")
    status = nvrtc.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])
    if int(status[0]) != 0:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program), "nvrtcGetProgramLogSize")
        nvrtc.nvrtcGetProgramLog(program, log)
        text = log.decode(errors="replace").strip("\0 \n") or status[0].name
        raise CompilationError(f"NVRTC cannot compile {name} for sm_{architecture}: {text.splitlines()[0]}")
    cubin = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program), "nvrtcGetCUBINSize")
    _checked(nvrtc.nvrtcGetCUBIN(program, cubin), "nvrtcGetCUBIN")
    nvrtc.nvrtcDestroyProgram(program)
    return cubin


def cubin_of(source: str, name: str, architecture: int | str, options: Mapping[str, int]) -> bytes:
    """``compile_source``, from disk if it was compiled before; a cache that cannot be written is done without."""
    nvrtc, _ = bindings()
    key = repr((source, architecture, sorted(options.items()), _checked(nvrtc.nvrtcVersion(), "nvrtcVersion")))
    path = cache_folder() / f"{Path(name).stem}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        cubin = compile_source(source, name, architecture, options)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(cubin)
        os.replace(file.name, path)  # whole, also when several processes compile at once
    except OSError:
        pass
    return cubin


class Function:
    """A kernel, ready to launch on any device of its architecture."""

    def __init__(self, library: Any, name: str, shared_bytes: int = 0, index: int = 0) -> None:
        """More than 48 KB of shared memory are asked for on the device of this ``index`` only."""
        _, driver = bindings()
        kernel = _checked(driver.cuLibraryGetKernel(library, name.encode()), f"cuLibraryGetKernel({name})")
        if shared_bytes > 48 * 1024:
            most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            device = _checked(driver.cuDeviceGet(index), "cuDeviceGet")
            _checked(driver.cuKernelSetAttribute(most, shared_bytes, kernel, device), "cuKernelSetAttribute")
        self.shared_bytes = shared_bytes
        self._driver, self._function = driver, driver.CUfunction(int(kernel))

    def launch(
        self,
        device: torch.device,
        blocks: int,
        threads: int,
        arguments: Sequence[Any],
        early: bool = False,
        cluster: int = 1,
    ) -> None:
        """Launch on ``device``'s current stream.

        arguments  ctypes values, in the kernel's order
        early      let the kernel start before the one before it has ended (it waits itself); compute capability 9.0 on
        cluster    blocks of a thread block cluster, of which ``blocks`` is a multiple; compute capability 9.0 on
        """
        driver = self._driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = self.shared_bytes
        config.hStream = driver.CUstream(torch.cuda.current_stream(device).cuda_stream)
        attributes = []
        if early:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        if cluster > 1:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            shape = attribute.value.clusterDim
            shape.x, shape.y, shape.z = cluster, 1, 1
            attributes.append(attribute)
        if attributes:
            config.attrs, config.numAttrs = attributes, len(attributes)
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        with torch.cuda.device(device):
            _checked(driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(pointers), 0), "cuLaunchKernelEx")


@cache
def library(source: str, name: str, architecture: int | str, options: tuple[tuple[str, int], ...]) -> Any:
    """The loaded cubin. Raises CompilationError."""
    _, driver = bindings()
    cubin = cubin_of(source, name, architecture, dict(options))
    return _checked(driver.cuLibraryLoadData(cubin, [], [], 0, [], [], 0), "cuLibraryLoadData")


class TensorMap(ctypes.Structure):
    """A box of a matrix, as the copy engine of compute capability 9.0 takes it: a kernel's argument of 128 bytes."""

    _fields_ = [("opaque", ctypes.c_uint64 * 16)]

    @classmethod
    def of(cls, matrix: torch.Tensor, box: tuple[int, int]) -> TensorMap:
        """Boxes of ``box`` [rows, columns] of ``matrix``, 16-bit floats or int8, whose rows are contiguous.

        A row of a box is 64 or 128 bytes, and swizzled in shared memory. Rows begin at multiples of 16 bytes. What lies
        beyond the edges is read as 0, and not written.
        """
        _, driver = bindings()
        rows, columns = matrix.shape
        kind = {torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16", torch.int8: "UINT8"}[matrix.dtype]
        swizzle = f"CU_TENSOR_MAP_SWIZZLE_{box[1] * matrix.element_size()}B"
        result = driver.cuTensorMapEncodeTiled(
            getattr(driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{kind}"),
            2,
            matrix.data_ptr(),
            [driver.cuuint64_t(columns), driver.cuuint64_t(rows)],
            [driver.cuuint64_t(matrix.stride(0) * matrix.element_size())],
            [driver.cuuint32_t(box[1]), driver.cuuint32_t(box[0])],
            [driver.cuuint32_t(1), driver.cuuint32_t(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            getattr(driver.CUtensorMapSwizzle, swizzle),
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        return cls.from_buffer_copy(ctypes.string_at(_checked(result, "cuTensorMapEncodeTiled").getPtr(), 128))
