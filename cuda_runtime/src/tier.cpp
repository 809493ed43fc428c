#include "tier.h"

#include <algorithm>

#include "reaper.h"

namespace dak {
namespace {

constexpr double FREEING_SECONDS = 10;  // how long an allocation waits for memory that is being freed

std::size_t granularity(const Place& place) {
  std::size_t bytes = 0;
  const cu::MemAllocationProp properties = place.properties();
  driver().cuMemGetAllocationGranularity(&bytes, &properties, cu::GRANULARITY_MINIMUM);
  return bytes;
}

void need_peer(int device, int peer) {
  int possible = 0;
  driver().cuDeviceCanAccessPeer(&possible, device, peer);
  if (!possible)
    throw Error(ErrorKind::Tier, "cuda:" + std::to_string(device) + " cannot access the memory of cuda:" +
                                     std::to_string(peer) +
                                     " (no NVLink or PCIe peer access); use remote=\"cpu\"");
}

void need_what_gives_back(const Driver& cuda) {
  cuda.cuMemUnmap.need();
  cuda.cuMemRelease.need();
  cuda.cuMemAddressFree.need();
  cuda.cuEventDestroy.need();
}

}  // namespace

Tier::Tier(int device, int peer, cu::LocationType host_access) : device_(device), peer_(peer) {
  need_what_gives_back(driver());
  if (!device_attribute(cu::DEVICE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device))
    throw Error(ErrorKind::UnsupportedDriver,
                "cuda:" + std::to_string(device) + " has no virtual memory management");
  local_ = {cu::LOCATION_DEVICE, device, false};
  const cu::MemAccessDesc own{{cu::LOCATION_DEVICE, device}, cu::ACCESS_READWRITE};
  if (peer >= 0) {
    need_peer(device, peer);
    need_peer(peer, device);
    remote_ = {cu::LOCATION_DEVICE, peer, false};
    const cu::MemAccessDesc other{{cu::LOCATION_DEVICE, peer}, cu::ACCESS_READWRITE};
    access_[0] = {own, other};
    primary_context(peer);
  } else {
    const int node = std::max(0, device_attribute(cu::DEVICE_HOST_NUMA_ID, device));
    const bool exportable =
        device_attribute(cu::DEVICE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, device);
    remote_ = {cu::LOCATION_HOST_NUMA, node, exportable};
    access_[0] = {own};
    access_[1] = {own, {{host_access, node}, cu::ACCESS_READWRITE}};
  }
  DeviceScope scope(device);
  page_bytes_ = std::max(granularity(local_), granularity(remote_));
  if (remote_is_host())
    pool_ = std::make_unique<PagePool>(remote_, device, page_bytes_, page_bytes_ * LARGE_HANDLE_PAGES);
  driver().cuStreamCreate(&stream_, cu::STREAM_NON_BLOCKING);
}

Tier::~Tier() {
  pool_.reset();
  if (!stream_ || in_forked_child() || !driver_is_open()) return;
  try {
    DeviceScope scope(device_);
    driver().cuStreamDestroy.status(stream_);
  } catch (const Error&) {
    // The driver went first, at the end of the process.
  }
}

std::vector<int> Tier::devices() const {
  return remote_is_host() ? std::vector<int>{device_} : std::vector<int>{device_, peer_};
}

std::vector<PhysicalPages> Tier::take(bool remote, const std::vector<std::size_t>& sizes) {
  const auto once = [&] {
    if (remote && pool_) return pool_->take(sizes);
    return create_pages(place(remote), sizes, place(remote).id, 1);
  };
  try {
    return once();
  } catch (const Error& error) {
    if (error.kind != ErrorKind::DeviceMemory && error.kind != ErrorKind::HostMemory) throw;
    reaper::drain(FREEING_SECONDS);
    return once();
  }
}

void Tier::clear(const PhysicalPages& pages) const {
  const std::size_t bytes = pages.bytes();
  const AddressRange window(bytes, page_bytes_);
  const Driver& cuda = driver();
  cuda.cuMemMap(window.address(), bytes, 0, pages.handle(), 0);
  try {
    grant_access(window.address(), bytes, Access::Devices);
    cuda.cuMemsetD8Async(window.address(), 0, bytes, stream_);
    cuda.cuStreamSynchronize(stream_);
  } catch (const Error&) {
    cuda.cuMemUnmap.status(window.address(), bytes);
    throw;
  }
  cuda.cuMemUnmap(window.address(), bytes);
}

std::shared_ptr<const PhysicalPages> Tier::zeros(std::size_t bytes) {
  std::lock_guard lock(zeros_mutex_);
  if (auto known = zeros_[bytes].lock()) return known;
  auto pages = std::make_shared<PhysicalPages>(std::move(take(false, {bytes}).front()));
  clear(*pages);
  zeros_[bytes] = pages;
  return pages;
}

void Tier::grant_reading(cu::DevicePtr address, std::size_t bytes) const {
  std::vector<cu::MemAccessDesc> readers = access_[static_cast<int>(Access::Devices)];
  for (cu::MemAccessDesc& reader : readers) reader.flags = cu::ACCESS_READ;
  if (driver().cuMemSetAccess.status(address, bytes, readers.data(), readers.size()) != cu::SUCCESS)
    grant_access(address, bytes, Access::Devices);
}

void Tier::grant_access(cu::DevicePtr address, std::size_t bytes, Access access) const {
  const std::vector<cu::MemAccessDesc>& descriptors = access_[static_cast<int>(access)];
  driver().cuMemSetAccess(address, bytes, descriptors.data(), descriptors.size());
}

}  // namespace dak
