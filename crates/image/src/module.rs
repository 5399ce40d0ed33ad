//! Kernel modules: what they depend on, and in which order they load.
//!
//! Debian's kernel package has no `modules.dep` (depmod makes it at installation), but each
//! module names its direct dependencies in its ELF section `.modinfo` as `depends=a,b`.

use std::collections::BTreeMap;

/// A module file that is not understood.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModuleError {
    /// Not a 64-bit little-endian ELF file, or its tables point outside.
    #[error("it is no intact 64-bit ELF file")]
    NotElf,
    /// No `.modinfo`.
    #[error("it has no .modinfo section")]
    NoModinfo,
}

/// Names of the modules that `module` depends on directly.
pub fn dependencies(module: &[u8]) -> Result<Vec<String>, ModuleError> {
    let info = section(module, ".modinfo")?.ok_or(ModuleError::NoModinfo)?;
    let names = info
        .split(|byte| *byte == 0)
        .filter_map(|entry| std::str::from_utf8(entry).ok()?.strip_prefix("depends="))
        .flat_map(|list| list.split(','))
        .filter(|name| !name.is_empty())
        .map(normal_name)
        .collect();
    Ok(names)
}

/// The kernel does not tell `-` from `_` in module names.
pub fn normal_name(name: &str) -> String {
    name.replace('-', "_")
}

/// The content of an ELF64 section by name (System V ABI, "Sections").
fn section<'a>(elf: &'a [u8], wanted: &str) -> Result<Option<&'a [u8]>, ModuleError> {
    const SECTION_HEADER: usize = 64;
    if elf.get(..6) != Some(b"\x7fELF\x02\x01") {
        return Err(ModuleError::NotElf);
    }
    let table = number(elf, 0x28, 8)?;
    let entry_size = number(elf, 0x3a, 2)?;
    let count = number(elf, 0x3c, 2)?;
    let names_index = number(elf, 0x3e, 2)?;
    if entry_size < SECTION_HEADER {
        return Err(ModuleError::NotElf);
    }
    let header = |index: usize| {
        let at = index
            .checked_mul(entry_size)
            .and_then(|offset| offset.checked_add(table))?;
        elf.get(at..at.checked_add(SECTION_HEADER)?)
    };
    let content = |header: &[u8]| {
        let start = number(header, 0x18, 8)?;
        let end = start
            .checked_add(number(header, 0x20, 8)?)
            .ok_or(ModuleError::NotElf)?;
        elf.get(start..end).ok_or(ModuleError::NotElf)
    };
    let names = content(header(names_index).ok_or(ModuleError::NotElf)?)?;
    for index in 0..count {
        let header = header(index).ok_or(ModuleError::NotElf)?;
        let name = names.get(number(header, 0, 4)?..).unwrap_or_default();
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        if name == wanted.as_bytes() {
            return content(header).map(Some);
        }
    }
    Ok(None)
}

/// A little-endian number of `size` bytes, at most 8.
fn number(bytes: &[u8], at: usize, size: usize) -> Result<usize, ModuleError> {
    let raw = at
        .checked_add(size)
        .and_then(|end| bytes.get(at..end))
        .ok_or(ModuleError::NotElf)?;
    let value = raw
        .iter()
        .rev()
        .fold(0u64, |value, byte| (value << 8) | u64::from(*byte));
    usize::try_from(value).map_err(|_| ModuleError::NotElf)
}

/// Puts `wanted` and all they need in an order in which each comes after what it depends on.
/// Names that `direct` does not know are taken to be built into the kernel.
pub fn load_order(wanted: &[&str], direct: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    let mut order = Vec::new();
    let mut entered = std::collections::BTreeSet::new();
    for name in wanted {
        visit(&normal_name(name), direct, &mut entered, &mut order);
    }
    order
}

fn visit(
    name: &str,
    direct: &BTreeMap<String, Vec<String>>,
    entered: &mut std::collections::BTreeSet<String>,
    order: &mut Vec<String>,
) {
    let Some(needs) = direct.get(name) else {
        return;
    };
    // Entered once each: a circle, which the kernel forbids, ends here too.
    if !entered.insert(name.to_owned()) {
        return;
    }
    for need in needs {
        visit(need, direct, entered, order);
    }
    order.push(name.to_owned());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A minimal module: ELF header, `.modinfo`, the names, two section headers.
    fn module(info: &[u8]) -> Vec<u8> {
        let names = b"\0.modinfo\0";
        let mut elf = vec![0; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        let info_at = elf.len();
        elf.extend(info);
        let names_at = elf.len();
        elf.extend(names);
        let table = elf.len();
        for (name, at, size) in [(1u32, info_at, info.len()), (0, names_at, names.len())] {
            let mut header = vec![0; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[0x18..0x20].copy_from_slice(&(at as u64).to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(size as u64).to_le_bytes());
            elf.extend(header);
        }
        elf[0x28..0x30].copy_from_slice(&(table as u64).to_le_bytes());
        elf[0x3a..0x3c].copy_from_slice(&64u16.to_le_bytes());
        elf[0x3c..0x3e].copy_from_slice(&2u16.to_le_bytes());
        elf[0x3e..0x40].copy_from_slice(&1u16.to_le_bytes());
        elf
    }

    #[test]
    fn dependencies_are_read_from_modinfo() {
        let elf = module(b"license=GPL\0depends=virtio,virtio-ring\0name=virtio_blk\0");
        assert_eq!(dependencies(&elf).unwrap(), ["virtio", "virtio_ring"]);
        assert_eq!(
            dependencies(&module(b"depends=\0")).unwrap(),
            Vec::<String>::new()
        );
    }

    proptest! {
        #[test]
        fn damaged_modules_never_panic(
            cut in 0usize..300, at in 0usize..300, value in any::<u8>()
        ) {
            let mut elf = module(b"depends=virtio,virtio_ring\0");
            let place = at % elf.len();
            elf[place] = value;
            elf.truncate(cut);
            let _ = dependencies(&elf);
        }

        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut elf = b"\x7fELF\x02\x01".to_vec();
            elf.extend(bytes);
            let _ = dependencies(&elf);
        }

        #[test]
        fn each_comes_after_its_dependencies(edges in prop::collection::vec((0usize..12, 0usize..12), 0..40)) {
            // Only edges to smaller numbers: no circles.
            let mut direct: BTreeMap<String, Vec<String>> = (0..12).map(|n| (n.to_string(), Vec::new())).collect();
            for (a, b) in edges {
                if b < a {
                    direct.get_mut(&a.to_string()).unwrap().push(b.to_string());
                }
            }
            let order = load_order(&["11", "5", "0"], &direct);
            for (place, name) in order.iter().enumerate() {
                for need in &direct[name] {
                    prop_assert!(order[..place].contains(need));
                }
                prop_assert!(!order[..place].contains(name));
            }
        }

        #[test]
        fn circles_end(edges in prop::collection::vec((0usize..5, 0usize..5), 0..20)) {
            let mut direct: BTreeMap<String, Vec<String>> = BTreeMap::new();
            for (a, b) in edges {
                direct.entry(a.to_string()).or_default().push(b.to_string());
            }
            prop_assert!(load_order(&["0", "1", "2"], &direct).len() <= 5);
        }
    }
}
