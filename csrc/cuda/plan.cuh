// The launchers' part of group.cuh: which group and which tile a call's kernel runs with.
//
// What a layer takes a block, and an exchange a group, is reckoned by the figures of an H100. Every
// group and every tile that there is a kernel for is laid out, and the one taken for which the op's
// estimate is least.
#pragma once

#include <algorithm>

#include "group.cuh"

namespace diffcore {
namespace cuda {

// -- what takes how long --------------------------------------------------------------------------

inline Exchange exchange_of(const Device& device, int group_size) {
  if (group_size == 1) return Exchange::none;
  return device.clusters ? Exchange::cluster : Exchange::grid;
}

constexpr int element_bytes(Precision precision) {
  return precision == Precision::bfloat16 || precision == Precision::float16 ? 2 : 4;
}

inline int operand_stride_of(Precision precision, int k) {
  return element_bytes(precision) == 2 ? operand_stride<uint16_t>(k) : operand_stride<float>(k);
}

inline int k_step_of(Precision precision) {
  switch (precision) {
    case Precision::float32: return Float32Math::k_step;
    case Precision::tf32: return Tf32Math::k_step;
    default: return Bfloat16Math::k_step;
  }
}

// Weights of a layer, whose columns the blocks of a group share out or each make all.
inline SlicedWeights sliced(Precision precision, int k, int columns, int group_size) {
  SlicedWeights w{};
  w.k = round_up(k, k_step_of(precision));
  w.columns = round_up(columns, 8);
  w.slice = 8 * divide_up(w.columns / 8, group_size);
  w.shared_offset = -1;
  return w;
}

// Of the slice in shared memory.
inline int slice_bytes(Precision precision, const SlicedWeights& w) {
  return round_up(element_bytes(precision) * w.slice * operand_stride_of(precision, w.k), 128);
}

// What a warp needs for its part of any layer: thin ones are multiplied in float32.
inline int bytes_for_warp(Precision precision, int rows, bool streams) {
  const int first = warp_bytes<Float32Math>(rows, streams);
  const int others = element_bytes(precision) == 2 ? warp_bytes<Bfloat16Math>(rows, streams)
                                                   : warp_bytes<Tf32Math>(rows, streams);
  return round_up(first > others ? first : others, 128);
}

// Bytes a clock that each of so many blocks gets from L2.
inline double l2_rate(int64_t blocks) { return blocks * 64 > 3000 ? 3000.0 / blocks : 64.0; }

// Wavefronts of shared memory, one a clock, by which a block's warps read their part of a layer's
// product: in a step of k two for 8 columns of weights, and for every tile of columns two for 4
// rows of float32, four for 16 of the others.
inline double wavefronts(Precision precision, const SlicedWeights& w, int rows) {
  const double steps = static_cast<double>(w.k) / k_step_of(precision);
  const double of_rows = precision == Precision::float32 ? rows / 2.0 : rows / 4.0;
  return steps * (w.slice / 4.0 + divide_up(w.slice, tile_columns) * of_rows);
}

// Clocks of a block's part of a layer's product: multiplying, shared memory or L2, whichever takes
// most.
inline double product_clocks(Precision precision, const SlicedWeights& w, int rows, double l2) {
  const double rate = precision == Precision::float32 ? 100
                      : precision == Precision::tf32  ? 400
                                                      : 800;
  const double weights = static_cast<double>(w.slice) * w.k;
  const double bytes = weights * element_bytes(precision);
  const bool streams = w.shared_offset < 0;
  const double multiplied = rows * weights / rate;
  const double shared = wavefronts(precision, w, rows) + (streams ? bytes / 128 : 0);
  const double read = streams ? bytes / l2 : 0;
  return 100 + std::max({multiplied, shared, read});
}

inline double activation_clocks(const SlicedWeights& w, int rows) { return 0.25 * rows * w.slice; }

// Clocks in which a group's blocks hand each other `rows` of their slices, of the products'
// precision: to meet, and in a cluster to send the slice to each other block, at some 12 bytes a
// clock.
inline double exchange_clocks(const GroupLayout& group, Precision precision, const SlicedWeights& w,
                              int rows) {
  const double sent = (group.size - 1.0) * rows * w.slice * element_bytes(precision);
  switch (group.exchange) {
    case Exchange::none: return 100;
    case Exchange::cluster: return 800 + sent / 12;
    default: return 2500;
  }
}

// -- plans ----------------------------------------------------------------------------------------

// A launch of a kernel whose groups take tiles of rows; of the kernel's `Arguments` these functions
// know `group` and `groups`.
template <class Arguments>
struct Plan {
  Arguments arguments;
  Launch launch;
  void (*kernel)(Arguments);
  int rows;       // of a tile
  double clocks;  // of a step of all tiles, by the op's estimate
};

// Groups of so many blocks that hand each other [rows, up to `widest`] of operands.
inline GroupLayout group_layout(const Device& device, Precision precision, int size, int rows,
                                int widest) {
  GroupLayout group{};
  group.size = size;
  group.exchange = exchange_of(device, size);
  group.hidden_stride = operand_stride_of(precision, round_up(widest, k_step_of(precision)));
  group.hidden_bytes = round_up(element_bytes(precision) * rows * group.hidden_stride, 128);
  return group;
}

// Of all blocks of the groups; alone or in clusters they needn't run at the same time.
inline Launch launch_of(const GroupLayout& group, int groups, int shared_bytes, void* stream) {
  Launch launch{static_cast<unsigned>(groups * group.size), block_threads,
                static_cast<size_t>(shared_bytes), stream};
  if (group.exchange == Exchange::cluster) launch.cluster = static_cast<unsigned>(group.size);
  launch.cooperative = group.exchange == Exchange::grid;
  return launch;
}

// Takes so many bytes of a block's shared memory and returns where they begin.
inline int take_shared(int* used, int bytes) {
  const int offset = *used;
  *used += round_up(bytes, 128);
  return offset;
}

// Arrays one after another in a workspace, each aligned to 256 bytes; without one they are only
// measured.
class Places {
 public:
  explicit Places(void* workspace) : workspace_(static_cast<char*>(workspace)) {}

  void* take(int64_t bytes) {
    void* place = workspace_ ? workspace_ + used_ : nullptr;
    used_ += (bytes + 255) / 256 * 256;
    return place;
  }
  float* floats(int64_t count) { return static_cast<float*>(take(4 * count)); }
  void take_weight(Precision precision, SlicedWeights* w) {
    w->weight = take(static_cast<int64_t>(element_bytes(precision)) * w->columns * w->k);
  }
  void take_exchanged(int groups, GroupLayout* group) {
    if (group->exchange != Exchange::grid) return;
    group->exchanged = static_cast<char*>(take(2LL * groups * group->hidden_bytes));
    group->counters = static_cast<unsigned*>(take(4LL * groups));
  }
  int64_t used() const { return used_; }

 private:
  char* workspace_;
  int64_t used_ = 0;
};

// What `use` returns for the Math of a precision.
template <class Use>
const char* by_precision(Precision precision, const Use& use) {
  switch (precision) {
    case Precision::float32: return use(Float32Math{});
    case Precision::tf32: return use(Tf32Math{});
    case Precision::bfloat16: return use(Bfloat16Math{});
    case Precision::float16: return use(Float16Math{});
  }
  return "an unknown precision";
}

// What follows plans for any `Op`, which has
//   Call, Arguments                 of its launcher and of its kernel
//   fewest_rows                     of a tile, in float32; others are 16 and 32
//   does_not_fit                    in words
//   kernel<Math, rows>()
//   check(call)                     why nothing can be planned, or nullptr
//   precision(call)
//   lay_out(call, device, group_size, most_groups, plan)
//                                   widths, launch and what lies where in shared memory, for at most
//                                   so many groups that take plan->rows; false if it doesn't fit
//   estimate(plan)                  clocks of a step
//   place(places, plan)             gives the plan's arrays their places

template <class Op>
using PlanOf = Plan<typename Op::Arguments>;

// Makes a plan the best one, if it fits and takes the least time so far. A device may run fewer
// clusters at the same time than it has multiprocessors for. Those beyond would wait until others
// have taken all their tiles, and a cooperative launch wouldn't begin. The driver is asked how many,
// which takes longer than all else here, about those plans alone that would be the best. Returns
// what went wrong.
template <class Op, class Math, int rows>
const char* consider(const typename Op::Call& call, const Device& device, int group_size,
                     PlanOf<Op>* best) {
  PlanOf<Op> plan{};
  plan.kernel = Op::template kernel<Math, rows>();
  plan.rows = rows;
  const auto is_best = [&](int most_groups) {
    if (!Op::lay_out(call, device, group_size, most_groups, &plan)) return false;
    plan.clocks = Op::estimate(plan);
    return !best->kernel || plan.clocks < best->clocks;
  };
  if (!is_best(device.multiprocessors / group_size)) return nullptr;
  if (plan.launch.cluster > 1) {
    int at_once = 0;
    if (const char* error = clusters_at_once(plan.launch, plan.kernel, &at_once)) return error;
    if (at_once < plan.arguments.groups && !is_best(at_once)) return nullptr;
  }
  *best = plan;
  return nullptr;
}

template <class Op, class Math>
const char* consider_all(const typename Op::Call& call, const Device& device, PlanOf<Op>* best) {
  for (const int group_size : {1, 2, 4, 8}) {
    if (!may_group(group_size)) continue;
    const char* error = nullptr;
    if constexpr (Math::least_rows <= Op::fewest_rows)
      error = consider<Op, Math, Op::fewest_rows>(call, device, group_size, best);
    if (!error) error = consider<Op, Math, 16>(call, device, group_size, best);
    if (!error) error = consider<Op, Math, 32>(call, device, group_size, best);
    if (error) return error;
  }
  return best->kernel ? nullptr : Op::does_not_fit;
}

template <class Op>
const char* make_plan(const typename Op::Call& call, PlanOf<Op>* plan) {
  if (const char* reason = Op::check(call)) return reason;
  Device device{};
  if (const char* error = current_device(&device)) return error;
  return by_precision(Op::precision(call), [&](auto math) {
    return consider_all<Op, decltype(math)>(call, device, plan);
  });
}

// A plan whose arrays lie in the call's workspace.
template <class Op>
const char* make_plan_in_workspace(const typename Op::Call& call, PlanOf<Op>* plan) {
  if (const char* error = make_plan<Op>(call, plan)) return error;
  Places places(call.workspace);
  Op::place(&places, plan);
  return places.used() <= call.workspace_bytes ? nullptr
                                               : "the workspace is smaller than the plan needs";
}

template <class Op>
int64_t workspace_bytes(const typename Op::Call& call) {
  PlanOf<Op> plan{};
  if (make_plan<Op>(call, &plan)) return -1;
  Places places(nullptr);
  Op::place(&places, &plan);
  return places.used();
}

}  // namespace cuda
}  // namespace diffcore
