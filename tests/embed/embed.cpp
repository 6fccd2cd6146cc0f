// Runs an exported encoder without Python:  embed ENCODER X OUT
// X is a tensor [n, D] that torch.save wrote; OUT gets (f, indices, values), for torch.load.
// It needs the LibTorch that lies in the installed torch:
//   T=$(python -c "import torch; print(torch.__path__[0])")
//   g++ -std=c++20 embed.cpp -I$T/include -I$T/include/torch/csrc/api/include -L$T/lib -Wl,-rpath,$T/lib
//       -ltorch -ltorch_cpu -lc10 -o embed                                                 (on one line)
#include <torch/script.h>

#include <fstream>
#include <iostream>
#include <iterator>

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: embed ENCODER X OUT\n";
    return 2;
  }
  torch::NoGradGuard no_grad;
  torch::jit::ExtraFilesMap extra{{"config.json", ""}};
  torch::jit::Module encoder = torch::jit::load(argv[1], torch::kCPU, extra);

  std::ifstream file(argv[2], std::ios::binary);
  std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  torch::Tensor x = torch::jit::pickle_load(bytes).toTensor();

  torch::Tensor f = encoder.forward({x}).toTensor();                        // [n, F]
  auto sparse = encoder.get_method("encode_sparse")({x}).toTuple();         // (row, latent) [2, m], value [m]
  torch::Tensor indices = sparse->elements()[0].toTensor(), values = sparse->elements()[1].toTensor();

  bytes = torch::jit::pickle_save(c10::ivalue::Tuple::create({f, indices, values}));
  std::ofstream(argv[3], std::ios::binary).write(bytes.data(), bytes.size());
  std::cout << extra["config.json"] << "\n";
}
