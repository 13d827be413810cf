//! The program `wbformat`: makes a cache device.

fn main() -> std::process::ExitCode {
    wbformat::main()
}
