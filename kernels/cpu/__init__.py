"""Forms of ops for the CPU in C++, compiled on the machine that runs them; see `kernels.cpu.library`.

How a C++ form is added
1. `kernels/cpu/<file>.cpp` gets an exported function: pointers, int64 and double arguments, the number of threads last;
   and a line RECORDABLE(its name), for steps that are recorded (`recording.py`). It spreads independent items by
   `parallel.h`, computes with the vectors of `vec.h`, and includes nothing of torch.
2. `library.FUNCTIONS` gets its line, and `kernels/cpu/<file>.py` a function of the op's name: its first parameter is
   `library: CpuLibrary`; the others are those of the torch form in `kernels/reference`, whose docstring is the
   contract. It checks what C++ cannot, and hands calls that the C++ form does not take to the torch form.
3. `kernels.dispatch._CPP` gets a line: the file and the dtypes of activations that it takes.
4. `tests/kernels/test_cpu_<file>.py` compares it with float64.
"""
