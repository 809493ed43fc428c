"""What copies into slots of a ring cost besides the bytes of the link."""

from __future__ import annotations

from dak_inductor.hardware_profile import HardwareProfile, LinkProfile

FORK_SECONDS = 4e-6
"""From the start of a call to that of its first copy, in a stream of its own. Assumed, as the next
two are, from what was measured of them together on the H200: calls that hide their copies take 8 us
longer than those without, and a product starts 11 us after the end of the copy it waits for. Each
holds 4 us of the product itself."""
CROSSING_SECONDS = 4e-6
"""From the end of a copy to the start of work that waits for it in another stream."""
JOIN_SECONDS = 4e-6
"""What a call with two streams takes longer to end, and the next one to start."""

_DEVICE_COPY_SECONDS = 5e-6  # 5 to 10 us of a few rows between copies of the link (H200)
_DEVICE_COPY_SHARE = 0.25  # of HBM bandwidth, assumed of copies inside device memory
_PIECE = 4 * 2**20  # bytes, as LinkProfile.piece_copy_bandwidth is measured


def piece_overhead(profile: HardwareProfile, link: LinkProfile) -> float:
    """What a copy costs besides its bytes: on the H200's host link 2.4 us, for 4 MiB pieces as for
    1 MiB and 256 KiB ones."""
    if not 0 < link.piece_copy_bandwidth < link.copy_bandwidth:
        return profile.operator_floor
    return _PIECE / link.piece_copy_bandwidth - _PIECE / link.copy_bandwidth


def link_copy_seconds(nbytes: int, profile: HardwareProfile, link: LinkProfile) -> float:
    """One copy of remote bytes; 0 for none."""
    return piece_overhead(profile, link) + nbytes / link.copy_bandwidth if nbytes else 0.0


def device_copy_seconds(nbytes: int, profile: HardwareProfile) -> float:
    """One copy inside device memory, between copies of the link; 0 for none."""
    if not nbytes:
        return 0.0
    return _DEVICE_COPY_SECONDS + nbytes / (_DEVICE_COPY_SHARE * profile.hbm_bandwidth)
