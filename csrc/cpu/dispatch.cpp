#include "dispatch.h"

#include <pthread.h>
#include <sys/mman.h>

#if defined(DIFFCORE_HAS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>
#include <new>
#include <stdexcept>
#include <unordered_map>
#include <utility>

namespace diffcore {

// ---- instruction sets -----------------------------------------------------------------------

#if defined(__x86_64__)
#if defined(DIFFCORE_HAS_AMX)
namespace avx512_amx { extern const Kernels kernels; }
#endif
namespace avx512_bf16 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
#elif defined(__aarch64__)
namespace neon { extern const Kernels kernels; }
#endif
namespace baseline { extern const Kernels kernels; }

namespace {

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#if defined(DIFFCORE_HAS_AMX)
// Whether the CPU multiplies tiles of bfloat16 and Linux (5.16 and newer) lets this process. It has to
// be asked, since their registers are 8 KiB a thread to save at a context switch; it refuses where a
// thread's alternate signal stack is too small for them.
bool has_avx512_amx() {
  unsigned a, b, c, d;
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  if (!(d & amx_bf16) || !(d & amx_tile)) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
  static const bool granted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  return granted;
}
#endif
#endif
bool everywhere() { return true; }

struct Candidate {
  const Kernels* kernels;
  bool (*supported)();
};

// Best first.
constexpr Candidate candidates[] = {
#if defined(__x86_64__)
#if defined(DIFFCORE_HAS_AMX)
    {&avx512_amx::kernels, has_avx512_amx},
#endif
    {&avx512_bf16::kernels, has_avx512_bf16},
    {&avx512::kernels, has_avx512},
    {&avx2::kernels, has_avx2},
#elif defined(__aarch64__)
    {&neon::kernels, everywhere},
#endif
    {&baseline::kernels, everywhere},
};

const Kernels& find_isa(const std::string& name) {
  std::string built;
  for (const Candidate& c : candidates) {
    built += (built.empty() ? "" : ", ") + std::string(c.kernels->isa);
    if (name != c.kernels->isa) continue;
    if (!c.supported())
      throw std::runtime_error("DIFFCORE_ISA: this CPU doesn't support '" + name + "'");
    return *c.kernels;
  }
  throw std::runtime_error("DIFFCORE_ISA: unknown instruction set '" + name +
                           "'; this build has: " + built);
}

const Kernels& best_isa() {
  const Candidate* candidate = candidates;
  while (!candidate->supported()) ++candidate;  // the last one is supported everywhere
  return *candidate->kernels;
}

std::atomic<const Kernels*> active{nullptr};

}  // namespace

const Kernels& active_kernels() {
  if (const Kernels* chosen = active.load(std::memory_order_acquire)) return *chosen;
  const char* forced = std::getenv("DIFFCORE_ISA");
  const Kernels& chosen = forced && *forced ? find_isa(forced) : best_isa();
  active.store(&chosen, std::memory_order_release);
  return chosen;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Candidate& c : candidates)
    if (c.supported()) names.emplace_back(c.kernels->isa);
  return names;
}

void use_isa(const std::string& isa) { active.store(&find_isa(isa), std::memory_order_release); }

// ---- threads --------------------------------------------------------------------------------

namespace {

bool forked = false;
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

struct ThreadBuffer {
  void* data = nullptr;
  int64_t size = 0;
  void release() {
    std::free(data);
    data = nullptr;
    size = 0;
  }
  ~ThreadBuffer() { release(); }
};
thread_local ThreadBuffer buffers[scratch_slots];

}  // namespace

int usable_threads(int wanted) {
  (void)fork_handler;
  return forked || wanted < 1 ? 1 : wanted;
}

int threads_for(int64_t rows, int wanted) {
  return rows < least_shared_rows ? 1 : usable_threads(wanted);
}

namespace {

using Clock = std::chrono::steady_clock;

// What two late teams take.
constexpr Clock::duration full_credit = std::chrono::milliseconds(10);

thread_local Clock::duration credit = full_credit;
thread_local Clock::duration price = full_credit;  // of the last late team
thread_local bool without_teams = false;
std::atomic<bool> always_teams{false};
std::atomic<int64_t> teams{0};

// A core reads this much from its L2 in 0.6 us; to meet another and fetch what it wrote takes 0.4 us.
constexpr int64_t team_share = 80 * 1024;

}  // namespace

TeamOptions team_options(int threads, TeamWork* work) {
  *work = TeamWork::none;
  if (always_teams) return {threads, 1, work};
  return {without_teams ? 1 : threads, team_share, work};
}

void team_ended(Clock::time_point start, TeamWork work) {
  const Clock::duration took = Clock::now() - start;
  if (work != TeamWork::none) ++teams;
  if (work == TeamWork::late) {
    price = std::min(took, full_credit / 2);  // some of it was work
    credit -= price;
  } else if (work == TeamWork::in_time) {
    credit += took / 4;  // it would have taken a quarter more, at least
  } else if (without_teams) {
    credit += took / 10;
  }
  credit = std::min(credit, full_credit);
  if (credit <= Clock::duration::zero()) without_teams = true;
  if (credit >= price) without_teams = false;
}

void always_use_teams(bool always) { always_teams = always; }

int64_t teams_run() { return teams; }

static std::atomic<bool> tile_memory_denied{false};

void deny_tile_memory(bool denied) { tile_memory_denied = denied; }

char* thread_scratch_or_null(Scratch slot, int64_t bytes) {
  ThreadBuffer& buffer = buffers[static_cast<int>(slot)];
  if (buffer.size < bytes || !buffer.data) {
    if (slot == Scratch::tile && tile_memory_denied) return nullptr;
    buffer.release();
    // Of no bytes, 64: null would mean that there aren't any.
    const int64_t rounded = bytes > 0 ? (bytes + 63) / 64 * 64 : 64;
    buffer.data = std::aligned_alloc(64, static_cast<size_t>(rounded));
    if (!buffer.data) return nullptr;
    buffer.size = rounded;
    // It will be taken anew at every such call.
    if (rounded > large_scratch) prefer_huge_pages(buffer.data, rounded);
  }
  return static_cast<char*>(buffer.data);
}

char* thread_scratch(Scratch slot, int64_t bytes) {
  char* const memory = thread_scratch_or_null(slot, bytes);
  if (!memory) throw_out_of_memory();
  return memory;
}

void release_scratch(Scratch slot) { buffers[static_cast<int>(slot)].release(); }

void release_large_scratch() {
  for (ThreadBuffer& buffer : buffers)
    if (buffer.size > large_scratch) buffer.release();
}

void throw_out_of_memory() { throw std::bad_alloc(); }

// ---- packs ----------------------------------------------------------------------------------

namespace { constexpr int64_t huge_page = int64_t{1} << 21; }

void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data), end = begin + bytes;
  const uintptr_t first = (begin + huge_page - 1) / huge_page * huge_page;
  const uintptr_t last = end / huge_page * huge_page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

Block::Block(int64_t bytes) {
  const bool large = bytes >= huge_page / 8;
  const int64_t alignment = large ? huge_page : 64;
  size_ = (bytes + alignment - 1) / alignment * alignment;
  data_ = static_cast<char*>(
      std::aligned_alloc(static_cast<size_t>(alignment), static_cast<size_t>(size_)));
  if (!data_) throw std::bad_alloc();
  if (large) prefer_huge_pages(data_, size_);
}

Block::~Block() { std::free(data_); }

namespace {

std::atomic<int64_t> built{0};

struct Fingerprint {
  uint32_t lanes[64];
  bool operator==(const Fingerprint& other) const {
    return std::memcmp(lanes, other.lanes, sizeof lanes) == 0;
  }
};

constexpr int64_t fingerprint_chunk = 8 * 1024;  // floats
constexpr int64_t shared_reading = 32 * 1024;    // floats that two threads read sooner than one

// Of all the pieces. Every chunk has a fingerprint of its own, so that threads can share them out, and
// the result is the fingerprint of those.
Fingerprint fingerprint(const Kernels& kernels, const std::vector<Piece>& pieces, int threads) {
  std::vector<Piece> chunks;
  int64_t total = 0;
  for (const Piece& piece : pieces) {
    total += piece.count;
    for (int64_t start = 0; start < piece.count; start += fingerprint_chunk)
      chunks.push_back({piece.values + start, std::min(fingerprint_chunk, piece.count - start)});
  }
  Fingerprint start;
  for (uint32_t i = 0; i < 64; ++i) start.lanes[i] = i;
  std::vector<Fingerprint> parts(chunks.size(), start);
  const auto count = static_cast<int64_t>(chunks.size());
#pragma omp parallel for num_threads(threads) if (threads > 1 && total >= shared_reading)
  for (int64_t i = 0; i < count; ++i)
    kernels.fingerprint(chunks[i].values, chunks[i].count, parts[i].lanes);
  for (const Fingerprint& part : parts)
    kernels.fingerprint(reinterpret_cast<const float*>(part.lanes), 64, start.lanes);
  return start;
}

enum class PackKind { denoiser, twin_critic, mlp, layer };

// What identifies a pack: who reads it, where its parameters lie, their shapes, their content.
struct PackKey {
  PackKind kind;
  const Kernels* kernels;
  const void* address;
  std::vector<int> shape;
  Fingerprint content;
  std::vector<Piece> pieces;
  int threads;

  PackKey(PackKind kind, const Kernels& k, const LinearParameters& first, std::vector<int> sizes)
      : kind(kind),
        kernels(&k),
        address(first.weight),
        shape(std::move(sizes)),
        threads(first.threads) {}
  void add(const float* values, int64_t count) { pieces.push_back({values, count}); }
  void add(const LinearParameters& layer) {
    // Parameters come whole: the rows lie `row_stride` apart with nothing between them.
    add(layer.weight, static_cast<int64_t>(layer.out) * layer.row_stride);
    if (layer.bias) add(layer.bias, layer.out);
    shape.insert(shape.end(), {layer.in, layer.out, layer.row_stride});
  }
  void read_content() { content = fingerprint(*kernels, pieces, threads); }
  bool same_place(const PackKey& other) const {
    return kind == other.kind && kernels == other.kernels && address == other.address &&
           shape == other.shape;
  }
};

struct CacheEntry {
  PackKey key;
  std::shared_ptr<void> packed;  // Packed<...> of the key's kind
  int64_t bytes;
};

// Packs of all kinds, of each place one, in the order of their last use. Those used longest ago go when
// all together take more than the budget: how many networks take turns doesn't matter, and what is left of
// networks that are gone is bounded.
class PackCache {
 public:
  using Entry = std::list<CacheEntry>::iterator;

  // The pack of the key's place, whatever its content, or null.
  const CacheEntry* find(const PackKey& key) {
    const auto found = find_place(key);
    if (found == places_.end()) return nullptr;
    entries_.splice(entries_.begin(), entries_, found->second);
    return &entries_.front();
  }
  void remove(const PackKey& key) {
    if (const auto found = find_place(key); found != places_.end()) drop(found);
  }
  // Instead of the one that has its place. The newest is kept whatever it takes.
  void add(CacheEntry entry) {
    remove(entry.key);
    std::list<CacheEntry> added;
    added.push_front(std::move(entry));
    places_.emplace(added.front().key.address, added.begin());
    entries_.splice(entries_.begin(), added);
    bytes_ += entries_.front().bytes;
    while (bytes_ > budget && entries_.size() > 1) drop(find_place(entries_.back().key));
  }

  std::mutex mutex;
  int64_t budget = int64_t{256} << 20;

 private:
  // By address: few packs are made of the same parameters, and only those are compared by the rest.
  using Places = std::unordered_multimap<const void*, Entry>;

  Places::iterator find_place(const PackKey& key) {
    auto [place, end] = places_.equal_range(key.address);
    while (place != end && !place->second->key.same_place(key)) ++place;
    return place == end ? places_.end() : place;
  }
  void drop(Places::iterator place) {
    bytes_ -= place->second->bytes;
    entries_.erase(place->second);
    places_.erase(place);
  }

  std::list<CacheEntry> entries_;
  Places places_;
  int64_t bytes_ = 0;
};

// Never destroyed: when the process ends, threads that nobody waits for may still be in a call.
PackCache& cache = *new PackCache;
constexpr int64_t entry_bytes = 1024;  // that a pack's key takes, with what leads to it

// A lock that another thread holds during fork() would stay locked in the child for ever.
const int cache_fork_handler = pthread_atfork(
    [] { cache.mutex.lock(); }, [] { cache.mutex.unlock(); }, [] { cache.mutex.unlock(); });

// build(memory, pack) fills a pack; bytes is the memory that it needs. An outdated pack's memory is
// used again unless a call in another thread still reads it.
template <class Pack, class Build>
std::shared_ptr<const Packed<Pack>> find_or_build(PackKey key, int64_t bytes, Build build) {
  (void)cache_fork_handler;
  key.read_content();
  std::shared_ptr<Packed<Pack>> packed;
  {
    const std::lock_guard<std::mutex> lock(cache.mutex);
    if (const CacheEntry* entry = cache.find(key)) {
      packed = std::static_pointer_cast<Packed<Pack>>(entry->packed);
      if (entry->key.content == key.content) return packed;
      cache.remove(key);
    }
  }
  if (!packed || packed.use_count() != 1 || packed->memory->size() < bytes) {
    packed = std::make_shared<Packed<Pack>>();
    packed->memory = std::make_unique<Block>(bytes);
  }
  // A count of 1 alone doesn't order what others read before they let go of it before what is written now.
  std::atomic_thread_fence(std::memory_order_acquire);
  build(packed->memory->data(), &packed->pack);
  ++built;
  // Another thread may have changed the weights after they were read: then the pack is of others than the
  // key says, and would be taken for theirs if they were put back.
  const Fingerprint before = key.content;
  key.read_content();
  if (!(key.content == before)) return packed;
  key.pieces = {};
  const std::lock_guard<std::mutex> lock(cache.mutex);
  cache.add({std::move(key), packed, packed->memory->size() + entry_bytes});
  return packed;
}

}  // namespace

std::shared_ptr<const Packed<DenoiserPack>> packed_denoiser(const DenoiserParameters& p,
                                                            TeamWork* work) {
  const Kernels& kernels = active_kernels();
  PackKey key(PackKind::denoiser, kernels, p.trunk[0],
              {p.action_dim, p.state_dim, p.steps, p.trunk_layers, static_cast<int>(p.activation),
               static_cast<int>(p.precision)});
  key.add(p.time_hidden);
  key.add(p.time_out);
  for (int l = 0; l < p.trunk_layers; ++l) key.add(p.trunk[l]);
  key.add(p.time_embedding, static_cast<int64_t>(p.steps) * p.time_hidden.in);
  return find_or_build<DenoiserPack>(std::move(key), kernels.denoiser_pack_bytes(p),
                                     [&](void* block, DenoiserPack* pack) {
                                       const TeamWork how = kernels.pack_denoiser(p, block, pack);
                                       if (work) *work = std::max(*work, how);
                                     });
}

std::shared_ptr<const Packed<TwinCriticPack>> packed_twin_critic(const TwinCriticParameters& p,
                                                                 TeamWork* work) {
  const Kernels& kernels = active_kernels();
  PackKey key(PackKind::twin_critic, kernels, p.critics[0].layers[0], {});
  for (const CriticParameters& critic : p.critics) {
    key.shape.insert(key.shape.end(),
                     {critic.action_dim, critic.state_dim, critic.layer_count,
                      static_cast<int>(critic.activation), static_cast<int>(critic.precision)});
    for (int l = 0; l < critic.layer_count; ++l) key.add(critic.layers[l]);
  }
  return find_or_build<TwinCriticPack>(
      std::move(key), kernels.twin_critic_pack_bytes(p), [&](void* block, TwinCriticPack* pack) {
        const TeamWork how = kernels.pack_twin_critic(p, block, pack);
        if (work) *work = std::max(*work, how);
      });
}

std::shared_ptr<const Packed<MlpPack>> packed_mlp(const MlpParameters& p) {
  const Kernels& kernels = active_kernels();
  PackKey key(
      PackKind::mlp, kernels, p.layers[0],
      {p.layer_count, static_cast<int>(p.precision), p.forward, p.backward, p.backward_to_input});
  for (int l = 0; l < p.layer_count; ++l) {
    key.add(p.layers[l]);
    key.shape.push_back(static_cast<int>(p.activations[l]));
  }
  return find_or_build<MlpPack>(
      std::move(key), kernels.mlp_pack_bytes(p),
      [&](void* block, MlpPack* pack) { kernels.pack_mlp(p, block, pack); });
}

std::shared_ptr<const Packed<PackedLinear>> packed_layer(const LinearParameters& p,
                                                         bool transposed) {
  const Kernels& kernels = active_kernels();
  PackKey key(PackKind::layer, kernels, p, {transposed, p.bias != nullptr});
  key.add(p);
  return find_or_build<PackedLinear>(
      std::move(key), kernels.layer_pack_bytes(p, transposed),
      [&](void* block, PackedLinear* pack) { kernels.pack_layer(p, transposed, block, pack); });
}

int64_t packs_built() { return built; }

void set_pack_budget(int64_t bytes) {
  const std::lock_guard<std::mutex> lock(cache.mutex);
  cache.budget = bytes;
}

void read_content(const std::vector<Piece>& pieces, int threads) {
  fingerprint(active_kernels(), pieces, threads);
}

}  // namespace diffcore
