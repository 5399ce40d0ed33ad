//! The list of kernel modules which the image builder writes beside them.

/// Where the builder puts the list in the initramfs.
pub const LIST: &str = "/mods/list";

/// One module to load.
#[derive(Debug, PartialEq, Eq)]
pub struct Module<'a> {
    /// File name below `/mods`.
    pub file: &'a str,
    /// The boot goes on without it: it drives something that only some machines have.
    pub optional: bool,
}

/// Reads the list: one file name a line, in the order of loading, a leading `?` for an
/// optional one. A name with a slash or none at all is no module of ours and is left out.
pub fn parse(text: &str) -> Vec<Module<'_>> {
    text.lines()
        .filter_map(|line| {
            let (file, optional) = match line.trim().strip_prefix('?') {
                Some(rest) => (rest.trim(), true),
                None => (line.trim(), false),
            };
            (!file.is_empty() && !file.contains('/')).then_some(Module { file, optional })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn order_and_marks_are_kept() {
        let modules = parse("virtio.ko\n?ptp_kvm.ko\n\n../x.ko\nvirtio_net.ko\n");
        let told: Vec<_> = modules.iter().map(|m| (m.file, m.optional)).collect();
        assert_eq!(
            told,
            [
                ("virtio.ko", false),
                ("ptp_kvm.ko", true),
                ("virtio_net.ko", false)
            ]
        );
    }

    proptest! {
        #[test]
        fn any_text_gives_only_plain_names(text in ".{0,300}") {
            for module in parse(&text) {
                prop_assert!(!module.file.is_empty() && !module.file.contains('/'));
            }
        }
    }
}
