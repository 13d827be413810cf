//! Texts from devices, such as labels, which may hold anything.

/// A text in a form that is safe to show. Anything but visible characters and blanks becomes an
/// escape such as `\n` or `\u{1b}`: control characters, line ends, marks of writing direction. A
/// backslash is doubled, so that different texts look different.
pub fn printable(text: &str) -> String {
    // Quotes do no harm.
    text.escape_debug().to_string().replace("\\'", "'").replace("\\\"", "\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_do_harm_to_a_terminal_or_a_reader_is_escaped() {
        for (text, shown) in [
            ("data-1", "data-1"),
            ("Bob's \"größte\" 磁盘", "Bob's \"größte\" 磁盘"),
            ("\u{1b}[31mred", "\\u{1b}[31mred"),
            ("a\nwbcheck: sound", "a\\nwbcheck: sound"),
            ("abc\u{202e}fed", "abc\\u{202e}fed"),
            ("\u{9b}31m\u{7f}\u{200b}\u{2028}\r", "\\u{9b}31m\\u{7f}\\u{200b}\\u{2028}\\r"),
            ("a\\n\\'", "a\\\\n\\\\'"),
        ] {
            assert_eq!(printable(text), shown);
        }
    }
}
