// What widgets/page.py makes of bytes: deflated, in 85 letters; and with `pack`, the even places before the odd ones.
const LETTERS = '0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;/=>?@^_`{|}~';

export function fromLetters(text) { // five letters are four bytes
  const value = new Uint8Array(128), filled = text.padEnd(Math.ceil(text.length / 5) * 5, '~');
  for (let i = 0; i < 85; i++) value[LETTERS.charCodeAt(i)] = i;
  const bytes = new DataView(new ArrayBuffer(filled.length / 5 * 4));
  for (let i = 0, at = 0; i < filled.length; at += 4) {
    let sum = 0;
    for (let k = 0; k < 5; k++) sum = sum * 85 + value[filled.charCodeAt(i++)];
    bytes.setUint32(at, sum);
  }
  return new Uint8Array(bytes.buffer, 0, bytes.byteLength - (filled.length - text.length));
}

export function inflate(text) { // a response, to be read as text or bytes
  return new Response(new Blob([fromLetters(text)]).stream().pipeThrough(new DecompressionStream('deflate')));
}

export async function unpack(text) {
  const planes = new Uint8Array(await inflate(text).arrayBuffer()), half = Math.ceil(planes.length / 2);
  const bytes = new Uint8Array(planes.length);
  for (let i = 0; i < planes.length; i++) bytes[i < half ? 2 * i : 2 * (i - half) + 1] = planes[i];
  return bytes;
}
