// Prints what kernels compute on the emulated GPU, to the bit, for test_cuda_emulator.py: the same on
// every host. Goes with emulator_kernels.cu.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

extern "C" {
void multiply(int precision, const float* a, const float* b, float* d);
void rounded(int precision, int count, const float* x, float* y);
void shuffle(int* out);
void shuffle_groups(int* out);
void pass_on(int* out);
void take_turns(int* out);
void copy_in_order(int* out);
void linear_layer(int precision, int rows, int row_count, int k, int columns, const float* x,
                  const float* w, int resident, void* packed, float* y);
}

// Numbers in [-1, 1) of a linear congruential generator.
std::vector<float> numbers(size_t count) {
  static uint32_t state = 1;
  std::vector<float> result(count);
  for (float& x : result) {
    state = state * 1664525u + 1013904223u;
    x = static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f;
  }
  return result;
}

void print(const char* name, const void* words, size_t count) {
  printf("%s", name);
  for (size_t i = 0; i < count; ++i) {
    uint32_t word;
    memcpy(&word, static_cast<const char*>(words) + 4 * i, sizeof(word));
    printf(" %08x", word);
  }
  printf("\n");
}

void print_ints(const char* name, void (*kernel)(int*), std::vector<int> out) {
  kernel(out.data());
  print(name, out.data(), out.size());
}

int main() {
  print_ints("shuffle", shuffle, std::vector<int>(32));
  print_ints("shuffle_groups", shuffle_groups, std::vector<int>(128));
  print_ints("pass_on", pass_on, std::vector<int>(8));
  print_ints("take_turns", take_turns, std::vector<int>(1));
  print_ints("copy_in_order", copy_in_order, {1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0});
  for (int precision = 1; precision < 4; ++precision) {
    const std::vector<float> x = numbers(256), a = numbers(256), b = numbers(128);
    std::vector<float> y(256), d(128);
    rounded(precision, 256, x.data(), y.data());
    print("rounded", y.data(), y.size());
    multiply(precision, a.data(), b.data(), d.data());
    print("multiply", d.data(), d.size());
  }
  const int sizes[][4] = {{16, 5, 7, 3}, {16, 11, 256, 40}, {32, 17, 65, 257}};
  for (int precision = 0; precision < 4; ++precision) {
    for (const auto& [tile, rows, k, columns] : sizes) {
      for (int resident = 0; resident < 2; ++resident) {
        const std::vector<float> x = numbers(static_cast<size_t>(rows) * k);
        const std::vector<float> w = numbers(static_cast<size_t>(columns) * k);
        const size_t padded = (static_cast<size_t>(columns) + 7) / 8 * 8;
        std::vector<float> packed(padded * (static_cast<size_t>(k) + 16)), y(padded * rows);
        linear_layer(precision, tile, rows, k, columns, x.data(), w.data(), resident, packed.data(),
                     y.data());
        print("linear", y.data(), y.size());
      }
    }
  }
}
