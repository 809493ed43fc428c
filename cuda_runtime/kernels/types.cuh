// Integers by width: NVRTC compiles without a host's <cstdint>.
#pragma once

namespace dak {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

static_assert(sizeof(u16) == 2 && sizeof(u32) == 4 && sizeof(u64) == 8 && sizeof(void*) == 8);

}  // namespace dak
