// Calls a server and prints what came of it. Argument: JSON with `options` of the client and a list of `calls`.
import { createClient } from "two-tower-rec";

const { options, calls, abortAfterMs } = JSON.parse(process.argv[2]);
const client = createClient(options);
for (const [method, path, init] of calls) {
  const signal = abortAfterMs === undefined ? undefined : AbortSignal.timeout(abortAfterMs);
  try {
    const { data, error, response } = await client[method](path, { ...init, ...(signal && { signal }) });
    console.log(JSON.stringify({ status: response.status, data, error }));
  } catch (error) {
    console.log(JSON.stringify({ thrown: `${error.name}: ${error.message}` }));
  }
}
