//! The program starts. This being an integration test of this package, `cargo test --workspace`
//! builds the program afresh, which the end-to-end tests in `tests/` rely on.

use std::process::Command;

#[test]
fn the_program_tells_its_version() {
    let output = Command::new(env!("CARGO_BIN_EXE_wbcheck"))
        .arg("--version")
        .output()
        .expect("a program that starts");
    assert!(output.status.success());
    assert_eq!(output.stdout, concat!("wbcheck ", env!("CARGO_PKG_VERSION"), "\n").as_bytes());
}
