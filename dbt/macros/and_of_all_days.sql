{#- Rows by day, and beside them one row of all days together for each key: its `created_day` is null. These are brought up to
    date by what the changed days have come to less what they had come to before, so history is not read again. One statement
    replaces both (bq_insert_overwrite_sql), so the same build once more gives the same rows, however the last one ended.
    `by_day` names a CTE with created_day, the keys, and numbers to add up: counts, the first of which is of all orders, and sums. -#}
{%- macro and_of_all_days(by_day, keys, counts, sums=[]) -%}
before as (

    {% if changed_days() is none or flags.FULL_REFRESH -%}
    select * from {{ by_day }}
    where false
    {%- else -%}
    select * from {{ this }}
    where created_day is null or {{ is_of_a_changed_day('created_day', 'date') }}
    {%- endif %}

),

with_signs as (

    select *, 1 as sign from {{ by_day }}
    union all
    select *, if(created_day is null, 1, -1) as sign from before

),

of_all_days as (

    select
        cast(null as date) as created_day,
        {{ keys | join(',\n        ') }},
        {% for count in counts -%}
        cast(sum(with_signs.{{ count }} * with_signs.sign) as int64) as {{ count }}{{ ',' if sums or not loop.last }}
        {% endfor -%}
        {%- for sum in sums -%}
        sum(with_signs.{{ sum }} * with_signs.sign) as {{ sum }}{{ ',' if not loop.last }}
        {% endfor %}
    from with_signs
    group by {{ keys | join(', ') }}
    having sum(with_signs.{{ counts[0] }} * with_signs.sign) > 0

),

final as (

    select * from {{ by_day }}
    union all
    select * from of_all_days

)
{%- endmacro -%}
