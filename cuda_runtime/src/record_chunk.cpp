#include "record_chunk.h"

#include <string>

#include "physical.h"
#include "reaper.h"

namespace dak {

std::shared_ptr<RecordChunk> RecordChunk::create(int device, std::size_t nbytes) {
  DeviceScope scope(device);
  return std::shared_ptr<RecordChunk>(new RecordChunk(device, nbytes), [device](RecordChunk* chunk) {
    reaper::free_later({device}, device, chunk);
  });
}

RecordChunk::RecordChunk(int device, std::size_t nbytes) : device_(device), nbytes_(nbytes) {
  const cu::Result status = driver().cuMemAlloc.status(&address_, nbytes);
  if (status == cu::ERROR_OUT_OF_MEMORY)
    throw Error(ErrorKind::DeviceMemory,
                "cuMemAlloc of " + std::to_string(nbytes) + " bytes failed with " + describe(status));
  if (status != cu::SUCCESS) throw_driver_error("cuMemAlloc", status);
  try {
    driver().cuStreamCreate(&stream_, cu::STREAM_NON_BLOCKING);
    const std::string zeros(nbytes, '\0');
    write(zeros.data(), nbytes, 0);
  } catch (...) {
    release();
    throw;
  }
  count_memory("records", static_cast<std::ptrdiff_t>(nbytes_));
}

RecordChunk::~RecordChunk() {
  try {
    DeviceScope scope(device_);
    if (release()) count_memory("records", -static_cast<std::ptrdiff_t>(nbytes_));
  } catch (const Error&) {
    // The context is gone, and its memory with it.
  }
}

bool RecordChunk::release() {
  if (stream_) driver().cuStreamDestroy.status(stream_);
  return driver().cuMemFree.status(address_) == cu::SUCCESS;
}

void RecordChunk::check(std::size_t count, std::size_t offset) const {
  driver();
  if (offset > nbytes_ || count > nbytes_ - offset)
    throw Error(ErrorKind::Tier, std::to_string(count) + " bytes at " + std::to_string(offset) +
                                     " do not lie in a chunk of " + std::to_string(nbytes_) + " bytes");
}

void RecordChunk::write(const void* bytes, std::size_t count, std::size_t offset) {
  check(count, offset);
  DeviceScope scope(device_);
  driver().cuMemcpyHtoDAsync(address_ + offset, bytes, count, stream_);
  driver().cuStreamSynchronize(stream_);
}

void RecordChunk::read(void* bytes, std::size_t count, std::size_t offset) {
  check(count, offset);
  DeviceScope scope(device_);
  driver().cuMemcpyDtoHAsync(bytes, address_ + offset, count, stream_);
  driver().cuStreamSynchronize(stream_);
}

}  // namespace dak
