"""What can go wrong in a kernel, by name. Messages say kernel, block, thread, instruction."""


class PtxError(Exception):
    """Base of all errors that the emulator raises."""


class ParseError(PtxError):
    """The text is not the PTX that the parser knows."""


class Unsupported(PtxError):
    """An instruction or a form of one that the emulator does not model."""


class OutOfBounds(PtxError):
    """An access outside an array, the block's shared memory, local memory or the parameters."""


class Misaligned(PtxError):
    """An address that is not a multiple of the access size."""


class MaskError(PtxError):
    """A warp collective whose mask is wrong: caller left out, lane exited or source outside it."""


class DivergentBarrier(PtxError):
    """Threads of one warp reach a barrier apart, or only some of them reach it."""


class Deadlock(PtxError):
    """Nothing can run any more; the message lists who waits for what."""


class NoProgress(PtxError):
    """The step limit was reached: most likely a spin loop whose condition never comes true."""


class SharedRace(PtxError):
    """Two unordered accesses to the same shared memory, one of them a write."""


class GlobalRace(PtxError):
    """Two unordered accesses to the same global memory, one of them a plain write."""


class UninitializedRead(PtxError):
    """A read of shared memory, or of an `Uninitialized` array, that nothing has written."""


class AsyncHazard(PtxError):
    """Data or registers of an asynchronous operation are touched before it was waited for."""


class ProxyFenceMissing(PtxError):
    """TMA or wgmma reads what ordinary stores wrote, with no fence.proxy.async in between."""


class MBarrierError(PtxError):
    """An mbarrier is used before it is initialised, arrived at too often, or counts no bytes."""


class ClusterError(PtxError):
    """Memory of a block that has exited, or a cluster's barrier used wrongly."""


class DescriptorError(PtxError):
    """A wgmma descriptor, a TMA box or a matrix address that the hardware would refuse."""


class Trap(PtxError):
    """The kernel executed trap or a failing assert."""
