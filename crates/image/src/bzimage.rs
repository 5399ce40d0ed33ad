//! The ELF kernel inside a bzImage, which Firecracker boots.
//!
//! A bzImage is a boot sector with a setup header, setup code, and a small program that
//! carries the compressed kernel as payload (Documentation/arch/x86/boot.rst). Debian
//! compresses with LZ4 in its legacy frame: magic, then blocks of up to 8 MiB, each with its
//! compressed length before it; the kernel's build appends the unpacked length.

/// A bzImage that is not understood.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BzImageError {
    /// No setup header where it must be.
    #[error("it is no Linux bzImage")]
    NotBzImage,
    /// Older than boot protocol 2.08, which introduced the payload fields.
    #[error(
        "its boot protocol {0:#06x} does not say where the payload is (2.08 or newer is needed)"
    )]
    OldProtocol(u16),
    /// A length points past the end of the file.
    #[error("it ends before its payload does")]
    Truncated,
    /// Compressed in another way.
    #[error("its payload is not compressed with LZ4 (it starts with {0:02x?})")]
    NotLz4([u8; 4]),
    /// The LZ4 data are damaged.
    #[error("its LZ4 payload is damaged: {0}")]
    Damaged(String),
    /// Unpacked well, but it is no ELF file.
    #[error("its payload is no ELF kernel")]
    NotElf,
    /// More than a kernel can be.
    #[error("its payload unpacks to more than {MAX_KERNEL} bytes")]
    TooLarge,
}

const SETUP_SECTS: usize = 0x1f1;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const LZ4_LEGACY: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
/// Uncompressed size of a legacy block.
const BLOCK: usize = 8 << 20;
/// No kernel is larger; damaged data must not fill the memory.
const MAX_KERNEL: usize = 512 << 20;

/// Extracts the ELF kernel.
pub fn extract_elf(image: &[u8]) -> Result<Vec<u8>, BzImageError> {
    let elf = unpack_lz4(payload(image)?)?;
    if elf.get(..6) != Some(b"\x7fELF\x02\x01") {
        return Err(BzImageError::NotElf);
    }
    Ok(elf)
}

/// The compressed payload.
fn payload(image: &[u8]) -> Result<&[u8], BzImageError> {
    if image.get(MAGIC..MAGIC + 4) != Some(b"HdrS") {
        return Err(BzImageError::NotBzImage);
    }
    let version = image
        .get(VERSION..VERSION + 2)
        .and_then(|raw| raw.try_into().ok())
        .map(u16::from_le_bytes);
    match version {
        Some(version) if version >= 0x208 => {}
        Some(version) => return Err(BzImageError::OldProtocol(version)),
        None => return Err(BzImageError::NotBzImage),
    }
    let setup_sectors = match image.get(SETUP_SECTS) {
        // For historical reasons 0 means 4.
        Some(0) => 4,
        Some(count) => usize::from(*count),
        None => return Err(BzImageError::NotBzImage),
    };
    let start = word(image, PAYLOAD_OFFSET)?
        .checked_add((setup_sectors + 1) * 512)
        .ok_or(BzImageError::Truncated)?;
    let end = start
        .checked_add(word(image, PAYLOAD_LENGTH)?)
        .ok_or(BzImageError::Truncated)?;
    image.get(start..end).ok_or(BzImageError::Truncated)
}

fn word(bytes: &[u8], at: usize) -> Result<usize, BzImageError> {
    let raw = bytes
        .get(at..at + 4)
        .and_then(|raw| raw.try_into().ok())
        .ok_or(BzImageError::Truncated)?;
    usize::try_from(u32::from_le_bytes(raw)).map_err(|_| BzImageError::Truncated)
}

/// Unpacks an LZ4 legacy frame with the unpacked length appended.
fn unpack_lz4(payload: &[u8]) -> Result<Vec<u8>, BzImageError> {
    let magic: [u8; 4] = payload
        .get(..4)
        .and_then(|raw| raw.try_into().ok())
        .ok_or(BzImageError::Truncated)?;
    if magic != LZ4_LEGACY {
        return Err(BzImageError::NotLz4(magic));
    }
    let end = payload
        .len()
        .checked_sub(4)
        .ok_or(BzImageError::Truncated)?;
    let expected = word(payload, end)?;
    if expected > MAX_KERNEL {
        return Err(BzImageError::TooLarge);
    }
    let mut out = Vec::new();
    let mut block = vec![0; BLOCK];
    let mut at = 4;
    while at < end {
        let length = word(payload, at)?;
        at += 4;
        let stop = at
            .checked_add(length)
            .filter(|stop| *stop <= end)
            .ok_or(BzImageError::Truncated)?;
        let packed = payload.get(at..stop).ok_or(BzImageError::Truncated)?;
        let size = lz4_flex::block::decompress_into(packed, &mut block)
            .map_err(|error| BzImageError::Damaged(error.to_string()))?;
        if out.len() + size > MAX_KERNEL {
            return Err(BzImageError::TooLarge);
        }
        out.extend(block.get(..size).unwrap_or_default());
        at = stop;
    }
    if out.len() != expected {
        let told = format!("{} bytes where {expected} are announced", out.len());
        return Err(BzImageError::Damaged(told));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bzimage(kernel: &[u8], setup_sectors: u8, gap: usize) -> Vec<u8> {
        let mut frame = LZ4_LEGACY.to_vec();
        for block in kernel.chunks(BLOCK) {
            let packed = lz4_flex::block::compress(block);
            frame.extend((packed.len() as u32).to_le_bytes());
            frame.extend(packed);
        }
        frame.extend((kernel.len() as u32).to_le_bytes());
        let real = if setup_sectors == 0 {
            4
        } else {
            usize::from(setup_sectors)
        };
        let start = (real + 1) * 512;
        let mut image = vec![0; (start + gap).max(0x260)];
        image[SETUP_SECTS] = setup_sectors;
        image[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
        image[VERSION..VERSION + 2].copy_from_slice(&0x20fu16.to_le_bytes());
        image[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&(gap as u32).to_le_bytes());
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4]
            .copy_from_slice(&(frame.len() as u32).to_le_bytes());
        image.truncate(start + gap);
        image.extend(frame);
        image
    }

    fn kernel(body: &[u8]) -> Vec<u8> {
        [b"\x7fELF\x02\x01", body].concat()
    }

    #[test]
    fn a_kernel_of_several_blocks_comes_out_whole() {
        let elf = kernel(
            &(0..(BLOCK + 12345))
                .map(|n| (n / 97) as u8)
                .collect::<Vec<_>>(),
        );
        assert_eq!(extract_elf(&bzimage(&elf, 39, 716)).unwrap(), elf);
    }

    #[test]
    fn other_compressions_are_named() {
        let mut image = bzimage(&kernel(b"x"), 1, 0);
        image[1024..1028].copy_from_slice(&[0x28, 0xb5, 0x2f, 0xfd]);
        assert_eq!(
            extract_elf(&image),
            Err(BzImageError::NotLz4([0x28, 0xb5, 0x2f, 0xfd]))
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_kernel_comes_out(body in prop::collection::vec(any::<u8>(), 0..3000), sectors in 0u8..40, gap in 0usize..900) {
            let elf = kernel(&body);
            prop_assert_eq!(extract_elf(&bzimage(&elf, sectors.max(1), gap)).unwrap(), elf);
        }

        #[test]
        fn damage_is_an_error_or_another_kernel_never_a_panic(
            at in any::<prop::sample::Index>(), value in any::<u8>(), cut in any::<prop::sample::Index>()
        ) {
            let mut image = bzimage(&kernel(&[7; 500]), 4, 8);
            let place = at.index(image.len());
            image[place] = value;
            let _ = extract_elf(&image);
            let length = cut.index(image.len());
            prop_assert!(extract_elf(&image[..length]).is_err());
        }

        #[test]
        fn random_payloads_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = unpack_lz4(&[&LZ4_LEGACY[..], &bytes].concat());
        }
    }
}
