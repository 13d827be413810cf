//! The program `wbcheck`: reads a cache device and says whether it is sound.

fn main() -> std::process::ExitCode {
    wbcheck::main()
}
