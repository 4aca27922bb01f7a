# simt_stems: the CUDA kernels that g++ compiles as plain C++, by their stems: all whose files take no
# products (tensor cores, bulk copies) from a header. simt_bindings: torch's side of them.
file(GLOB kernels "${CMAKE_CURRENT_LIST_DIR}/../cuda/*.cu")
set(simt_stems "")
set(simt_bindings "")
foreach(kernel IN LISTS kernels)
  file(STRINGS "${kernel}" products REGEX "^#include \".*(gemm|mma|sm90)")
  get_filename_component(stem "${kernel}" NAME_WE)
  if(products)
    continue()
  endif()
  list(APPEND simt_stems ${stem})
  if(EXISTS "${CMAKE_CURRENT_LIST_DIR}/../torch/${stem}.cpp")
    list(APPEND simt_bindings "csrc/torch/${stem}.cpp")
  endif()
endforeach()
if(CMAKE_SCRIPT_MODE_FILE)
  message(STATUS "${simt_stems}")  # cmake -P: for who asks
endif()
