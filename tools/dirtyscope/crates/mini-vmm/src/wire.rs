// SPDX-License-Identifier: GPL-2.0-only

//! What is sent: messages of three numbers, behind some of which there are bytes.

use crate::{Error, Result};
use std::io::{Read, Write};

/// Bytes of a device's state in one message, at most: who receives needn't have memory for more.
pub const CHUNK: u64 = 1 << 20;

/// A message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// So many bytes of memory follow, from this guest address on.
    Memory { address: u64, length: u64 },
    /// So many bytes of the state of this device follow, which continue those that were sent before.
    DeviceData { device: u64, length: u64 },
    /// That was all.
    End,
    /// The answer to [`Message::End`]: the machine is there.
    Taken,
}

impl Message {
    pub fn write(self, to: &mut impl Write) -> Result<()> {
        let numbers = match self {
            Self::Memory { address, length } => [1, address, length],
            Self::DeviceData { device, length } => [2, device, length],
            Self::End => [3, 0, 0],
            Self::Taken => [4, 0, 0],
        };
        Ok(to.write_all(&numbers.map(u64::to_le_bytes).concat())?)
    }

    pub fn read(from: &mut impl Read) -> Result<Self> {
        let mut numbers = [0; 3];
        for number in &mut numbers {
            let mut bytes = [0; 8];
            from.read_exact(&mut bytes)?;
            *number = u64::from_le_bytes(bytes);
        }
        match numbers {
            [1, address, length] => Ok(Self::Memory { address, length }),
            [2, device, length] if length <= CHUNK => Ok(Self::DeviceData { device, length }),
            [3, 0, 0] => Ok(Self::End),
            [4, 0, 0] => Ok(Self::Taken),
            numbers => Err(Error::Protocol(format!("{numbers:?}, which is no message"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_read_as_they_were_written() {
        let messages = [
            Message::Memory { address: 1 << 32, length: u64::MAX },
            Message::DeviceData { device: 1, length: CHUNK },
            Message::End,
            Message::Taken,
        ];
        let mut bytes = Vec::new();
        messages.iter().for_each(|message| message.write(&mut bytes).unwrap());
        let mut bytes = &bytes[..];
        for message in messages {
            assert_eq!(Message::read(&mut bytes).unwrap(), message);
        }
        let ended = Message::read(&mut bytes).unwrap_err().to_string();
        assert!(ended.starts_with("connection: "), "{ended}");
    }

    #[test]
    fn what_is_no_message_is_refused() {
        for numbers in [[0, 0, 0], [2, 0, CHUNK + 1], [3, 1, 0], [5, 0, 0]] {
            let bytes = numbers.map(u64::to_le_bytes).concat();
            let refused = Message::read(&mut &bytes[..]).unwrap_err().to_string();
            assert!(refused.ends_with("which is no message"), "{numbers:?}: {refused}");
        }
    }
}
