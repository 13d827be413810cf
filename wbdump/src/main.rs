//! The program `wbdump`: shows the log on a cache device.

fn main() -> std::process::ExitCode {
    wbdump::main()
}
