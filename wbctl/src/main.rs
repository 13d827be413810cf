//! The program `wbctl`: creates, attaches, detaches, replays and upgrades caches.

fn main() -> std::process::ExitCode {
    wbctl::main()
}
