// Chooses the instruction set, keeps packed weights, and gives threads their scratch memory.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"

namespace diffcore {

// The kernels in use: the best that CPU and build have, or what DIFFCORE_ISA names. Throws
// std::runtime_error if that is unknown, not built or not supported here.
const Kernels& active_kernels();

// Instruction sets that are built in and that this CPU supports, best first.
std::vector<std::string> available_isas();

// Makes `isa` the active one, for tests; packs of another set are never mixed in.
void use_isa(const std::string& isa);

// How many threads a call may have: `wanted`, but 1 in a forked process. If OpenMP had started threads
// before, the GNU runtime can't start new ones there; it can't be asked whether it had.
int usable_threads(int wanted);
// The same for a call of so many rows.
int threads_for(int64_t rows, int wanted);

// How a call's threads may work together on what is no more than a tile; `work` will say how they did.
//
// A team that meets many times in a call is fast if all its threads run at once. But one that is
// asleep, or whose CPU another process has, keeps the rest waiting, for milliseconds. So teams keep an
// account for the thread that calls: calls in time earn a part of what they took, late ones cost it,
// and without credit tiles are run alone until a tenth of the time would pay for one more late one.
TeamOptions team_options(int threads, TeamWork* work);
// Ends the call that began at `start`.
void team_ended(std::chrono::steady_clock::time_point start, TeamWork work);
// Teams whatever they cost, for tests.
void always_use_teams(bool always);
// How many calls were run by a team, for tests.
int64_t teams_run();

// Gives back what the calling thread has of more than 64 MiB: at the end of a call, for which fresh memory
// of that size is a small part of its work, and which may have been the only one so large. The other
// threads do so at the end of each parallel region.
void release_large_scratch();

// Lets every thread that needs more memory for its tiles than it has find none, for tests.
void deny_tile_memory(bool denied);

// Asks for huge pages in what lies whole within `bytes` of memory, whoever owns it. The first write to
// fresh memory then faults once in 2 MiB, not once in 4 KiB.
void prefer_huge_pages(void* data, int64_t bytes);

// A block of memory, in huge pages where the system grants them: panels are read from end to end at
// every step, and with 4 KiB pages the TLB would cost more than the cache.
class Block {
 public:
  explicit Block(int64_t bytes);
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  char* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  char* data_;
  int64_t size_;
};

template <class Pack>
struct Packed {
  std::unique_ptr<Block> memory;
  Pack pack;
};

// Packs of the given parameters. Kept in a cache of 256 MiB and found again by the parameters' addresses
// and CONTENT: however a weight was changed (optimiser step, `.data`, a NumPy view), a stale pack is
// never used. Where `work` isn't null, it is as much at least as how threads packed together.
std::shared_ptr<const Packed<DenoiserPack>> packed_denoiser(const DenoiserParameters&,
                                                            TeamWork* work);
std::shared_ptr<const Packed<TwinCriticPack>> packed_twin_critic(const TwinCriticParameters&,
                                                                 TeamWork* work);
std::shared_ptr<const Packed<MlpPack>> packed_mlp(const MlpParameters&);
// One layer, or, transposed, the way back through it; its bias may be null.
std::shared_ptr<const Packed<PackedLinear>> packed_layer(const LinearParameters&, bool transposed);

struct Piece {
  const float* values;
  int64_t count;
};

// What every call does with its parameters before it uses their pack: reads them all. For benchmarks.
void read_content(const std::vector<Piece>& pieces, int threads);

// Number of packs built so far in this process; lets tests and profiles see the cache work.
int64_t packs_built();
// How many bytes of packs are kept, for tests.
void set_pack_budget(int64_t bytes);

}  // namespace diffcore
