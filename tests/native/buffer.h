// The memory of one operand: an array of up to four dimensions at any strides, inside a red zone that must stay as it was.
#pragma once

#include <memory>
#include <vector>

#include "numbers.h"

namespace native {

struct Shape {
  int64_t size[4];
};

// What strides an array may have. The output of a call gets neither `zeros` nor overlapping elements of any kind.
struct Freedom {
  bool last_is_dense = false;  // the last dimension's stride is 1
  bool positive = false;       // no stride is negative
  bool zeros = false;          // a dimension may be expanded: stride 0
  bool broadcast[4] = {};      // of size 1 and stride 0, whatever the index
  bool tight = false;          // ends where the allocation does: AddressSanitizer sees a read behind it
};

class Buffer {
 public:
  Buffer() = default;

  // Filled with red-zone elements: NaN, or numbers that no argument may be.
  Buffer(Random &random, int64_t kind, Shape shape, const Freedom &freedom) : kind_(kind), shape_(shape) {
    int order[4] = {0, 1, 2, 3};
    const int outer = freedom.last_is_dense ? 3 : 4;
    for (int d = outer - 1; d > 0; --d) std::swap(order[d], order[random.between(0, d)]);
    if (freedom.last_is_dense) std::swap(order[0], order[3]);
    int64_t extent = 1;
    bool empty = false;
    first_ = 0;
    for (int d : order) {
      int64_t &stride = stride_[d];
      const int64_t size = freedom.broadcast[d] ? 1 : shape_.size[d];
      empty = empty || size == 0;
      const bool dense = d == 3 && freedom.last_is_dense;
      stride = dense ? 1 : extent + (random.chance(0.4) ? random.between(1, 7) : 0);
      if (freedom.broadcast[d]) {
        shape_.size[d] = size;
        stride = 0;
      } else if (size == 1 && !dense) {  // never multiplied by anything but 0
        static const int64_t odd[] = {-3, 0, 1, 7, int64_t(1) << 33};
        if (random.chance(0.5)) stride = odd[random.between(freedom.positive, 4)];
      } else if (!dense && freedom.zeros && random.chance(0.03)) {
        stride = 0;
      } else if (size > 1) {
        extent = stride * (size - 1) + extent;
        if (!dense && !freedom.positive && random.chance(0.03)) {
          first_ += stride * (size - 1);
          stride = -stride;
        }
      }
    }
    const int64_t before = random.between(0, 1) ? random.between(1, 19) : 16;
    first_ += before;
    elements_ = before + (empty ? 0 : extent) + (freedom.tight ? 0 : 40);
    memory_.reset(new unsigned char[static_cast<size_t>(bytes())]);
    fill();
  }

  explicit operator bool() const { return memory_ != nullptr; }
  int64_t kind() const { return kind_; }
  const Shape &shape() const { return shape_; }
  const int64_t *strides() const { return stride_; }
  int64_t bytes() const { return elements_ * size_of(kind_); }
  const unsigned char *memory() const { return memory_.get(); }
  void *data() const { return memory_.get() + first_ * size_of(kind_); }
  template <class T>
  T *as() const {
    return reinterpret_cast<T *>(data());
  }

  double get(int64_t a, int64_t b, int64_t c, int64_t d) const { return element(data(), kind_, at(a, b, c, d)); }
  void set(int64_t a, int64_t b, int64_t c, int64_t d, double value) { set_element(data(), kind_, at(a, b, c, d), value); }

  // fn(a, b, c, d) for every element.
  template <class Fn>
  void each(Fn fn) const {
    for (int64_t a = 0; a < shape_.size[0]; ++a)
      for (int64_t b = 0; b < shape_.size[1]; ++b)
        for (int64_t c = 0; c < shape_.size[2]; ++c)
          for (int64_t d = 0; d < shape_.size[3]; ++d) fn(a, b, c, d);
  }
  template <class Fn>
  void set_each(Fn fn) {
    each([&](int64_t a, int64_t b, int64_t c, int64_t d) { set(a, b, c, d, fn(a, b, c, d)); });
  }

  void fill() {
    for (int64_t i = 0; i < elements_; ++i) fill_one(memory_.get(), i);
  }

  std::vector<unsigned char> copy() const { return std::vector<unsigned char>(memory(), memory() + bytes()); }
  bool same(const std::vector<unsigned char> &was) const { return std::memcmp(memory(), was.data(), was.size()) == 0; }

  // Whether everything that is no element of the array is as fill() left it.
  bool red_zone_intact() const {
    std::vector<unsigned char> expected(static_cast<size_t>(bytes()));
    for (int64_t i = 0; i < elements_; ++i) fill_one(expected.data(), i);
    const int64_t width = size_of(kind_);
    each([&](int64_t a, int64_t b, int64_t c, int64_t d) {
      const int64_t offset = (first_ + at(a, b, c, d)) * width;
      std::memcpy(expected.data() + offset, memory() + offset, static_cast<size_t>(width));
    });
    return same(expected);
  }

 private:
  int64_t at(int64_t a, int64_t b, int64_t c, int64_t d) const {
    return a * stride_[0] + b * stride_[1] + c * stride_[2] + d * stride_[3];
  }

  void fill_one(unsigned char *memory, int64_t i) const {
    static const uint32_t wide[] = {0x7fc0dead, 0, 0, 0x7ffffff1, 0};
    const uint16_t half = 0x7fe5;  // NaN as bf16 and as fp16
    if (kind_ == kByte) memory[i] = 0xa5;
    if (kind_ == kFp32 || kind_ == kInt32) std::memcpy(memory + 4 * i, &wide[kind_], 4);
    if (kind_ == kBf16 || kind_ == kFp16) std::memcpy(memory + 2 * i, &half, 2);
  }

  int64_t kind_ = kByte;
  Shape shape_{};
  int64_t stride_[4] = {};
  int64_t first_ = 0;
  int64_t elements_ = 0;
  std::unique_ptr<unsigned char[]> memory_;
};

}  // namespace native
