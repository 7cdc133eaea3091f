-- `finpro transform --full-refresh` ends a difference.
with

fact as (

    select
        order_id,
        user_id,
        product_id,
        quantity,
        amount_numeric,
        created_date,
        status,
        array_to_string(reasons, ',') as reasons
    from {{ ref('fct_orders') }}
    where {{ is_of_a_changed_day('created_date') }}

),

loaded as (

    select
        order_id,
        user_id,
        product_id,
        quantity,
        amount_numeric,
        created_date,
        status,
        array_to_string(reasons, ',') as reasons
    from {{ ref('stg_orders') }}
    where {{ is_of_a_changed_day('created_date') }}

)

(
    select * from loaded
    except distinct
    select * from fact
)
union all
(
    select * from fact
    except distinct
    select * from loaded
)
